"""What `dfq` says where nobody wants colours."""

ESCAPE = "\x1b"


def plain(result):
    assert ESCAPE not in result.out + result.err
    return result
