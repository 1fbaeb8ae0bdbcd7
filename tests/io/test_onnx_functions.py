"""Functions of ONNX models: inlined, or refused."""

import onnx
from onnx import AttributeProto, helper
from onnx_protos import W, model, node, read, refused

from dfq_jax.errors import UnsafeInputError, UnsupportedModelError

IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]


def function(name: str, *nodes: onnx.NodeProto, imports=IMPORTS, **options) -> onnx.FunctionProto:
    """A function of `a` that computes `b`."""
    return helper.make_function("f", name, ["a"], ["b"], list(nodes), imports, **options)


def call(name: str, source: str, target: str, **attributes) -> onnx.NodeProto:
    return node(name, [source], [target], domain="f", **attributes)


def test_functions_are_inlined():
    scaled = function(
        "Scaled",
        node("Constant", [], ["c"], value=W),
        node("Mul", ["a", "c"], ["m"], name="mul"),
        node("LeakyRelu", ["m"], ["b"]),
        attributes=["alpha"],
    )
    leaky = scaled.node[2].attribute.add(name="alpha", type=AttributeProto.FLOAT)
    leaky.ref_attr_name = "alpha"
    program = read(
        model(
            call("Scaled", "x", "h", alpha=0.25),
            call("Scaled", "h", "y", alpha=0.5),
            functions=[scaled],
        )
    )
    assert [c.target for c in program.calls] == ["onnx.Mul", "onnx.LeakyRelu"] * 2
    assert [c.kwargs.get("alpha") for c in program.calls] == [None, 0.25, None, 0.5]
    assert [array.tolist() for array in program.arrays.values()] == [[0, 1, 2]] * 2
    assert program.notes == ("net.onnx: inlined f.Scaled",)


def test_functions_that_call_themselves_are_refused():
    loop = [function("A", call("B", "a", "b")), function("B", call("A", "a", "b"))]
    refused(model(call("A", "x", "y"), functions=loop), "function A calls itself")


def chain(length: int, *, twice: bool) -> list[onnx.FunctionProto]:
    """Functions each of which calls the next, once or twice."""
    end = function(f"F{length}", node("Relu", ["a"], ["b"]))
    once = [function(f"F{i}", call(f"F{i + 1}", "a", "b")) for i in range(length)]
    both = [
        function(f"F{i}", call(f"F{i + 1}", "a", "t"), call(f"F{i + 1}", "t", "b"))
        for i in range(length)
    ]
    return [*(both if twice else once), end]


def test_functions_that_would_fill_the_memory_are_refused():
    bomb, deep = chain(40, twice=True), chain(500, twice=False)
    start = call("F0", "x", "y")
    refused(model(start, functions=bomb), "would grow to [0-9]{14} bytes", UnsafeInputError)
    refused(model(start, functions=deep), "nests functions over 50 deep", UnsafeInputError)


def test_functions_that_cannot_be_inlined_are_refused():
    start, relu = call("A", "x", "y"), node("Relu", ["a"], ["b"])
    older = function("A", relu, imports=[helper.make_opsetid("", 13)])
    refused(model(start, functions=[older]), r"cannot be inlined: f\.A", UnsupportedModelError)
    wide = node("A", ["x", "x"], ["y"], domain="f")
    proto = model(wide, functions=[function("A", relu)])
    refused(proto, "cannot be inlined", UnsupportedModelError)
    refused(model(start, functions=[function("A", relu)] * 2), "defines a function twice")
