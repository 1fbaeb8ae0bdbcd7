"""Who watches is told what there is to tell; nobody need watch."""

import pytest

from dfq_jax.optim.progress import SILENT, Progress, UnitReport, Watcher

AT = Progress(0, 1, 2, 4, {"loss": 0.5})
UNIT = UnitReport("conv1", "brecq", 1.0, 0.5, kept=True, seconds=2.0)


def test_each_is_told_its_own():
    told = []
    watch = Watcher(
        stage=lambda text: told.append(("stage", text)),
        progress=lambda at: told.append(("progress", at)),
        unit=lambda *given: told.append(("unit", given)),
    )
    watch.says("folding")
    watch.advances(AT)
    watch.ends_unit(0, 3, UNIT)
    wordless = watch.without_words()
    wordless.says("nobody hears this")
    wordless.advances(AT)
    assert told == [
        *(("stage", "folding"), ("progress", AT), ("unit", (0, 3, UNIT))),
        ("progress", AT),
    ]


@pytest.mark.parametrize("watch", [SILENT, Watcher()])
def test_nobody_need_watch(watch):
    watch.says("folding")
    watch.advances(AT)
    watch.ends_unit(0, 3, UNIT)
