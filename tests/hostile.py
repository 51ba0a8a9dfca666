"""Files from strangers, made to harm: pickles and headers of safetensors files. What tests and benchmarks share."""

import io
import itertools
import json
import random
import zipfile
from collections.abc import Iterator

from diffusion.header import LONGEST, MOST, PLAIN

# What each payload would do: call this function of this module with this text.
CALLS = (
    ("os", "system", "touch ran"),
    ("posix", "system", "touch ran; exit 1"),
    ("subprocess", "getoutput", "touch ran"),
    ("builtins", "exec", "open('ran', 'w')"),
    ("builtins", "eval", "open('ran', 'w')"),
)


def payloads() -> Iterator[bytes]:
    """60 pickles that would make a file named "ran": each protocol and call, bare and inside torch's archive."""
    for protocol, (module, function, text) in itertools.product(range(6), CALLS):
        m, f, t = module.encode(), function.encode(), text.encode()
        if protocol < 2:
            body = b"c" + m + b"\n" + f + b"\n(V" + t + b"\ntR."
        elif protocol < 4:
            body = (
                bytes([0x80, protocol]) + b"c" + m + b"\n" + f + b"\nX" + len(t).to_bytes(4, "little") + t + b"\x85R."
            )
        else:
            texts = [b"\x8c" + bytes([len(part)]) + part for part in (m, f, t)]
            frame = texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."
            body = bytes([0x80, protocol, 0x95]) + len(frame).to_bytes(8, "little") + frame
        yield body
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("archive/data.pkl", body)
            packed.writestr("archive/version", "3")
        yield archive.getvalue()


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def headers() -> dict[str, bytes]:
    """Hostile headers by name: text, or something that JSON makes text of."""
    bad = {
        "nothing": b"",
        "no json": b"{",
        "a list": b"[]",
        "a text": b'"a"',
        "two": b"{}{}",
        "not utf-8": b'{"\xff": 1}',
        "nested": b'{"a":' * 100_000,
        "lists": b'{"a":' + b"[" * 100_000,
        "a long number": b'{"a":' + b"9" * 10_000 + b"}",
        "twice": b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2),
        "keys twice": b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
        "commas": b'{"a":[' + b"1," * 2_000_000 + b"1]}",
        "dicts": b"{%s}" % b",".join(b'"k%d":{}' % i for i in range(600_000)),
        "lists in lists": b'{"a":[%s]}' % b",".join([b"[[[[[[[[]]]]]]]]"] * 600_000),
        "texts": b'{"__metadata__":{%s}}' % b",".join(b'"k%d":"v%d"' % (i, i) for i in range(500_000)),
        "texts that end in a backslash": b'{"a":[%s]}' % b",".join(b'"%d\\\\"' % i for i in range(200_000)),
        "a long text of wide letters": b'{"a":"%s"}' % ("𝄞".encode() * (LONGEST // 4 - 10)),
        "one wide letter in a long text": b'{"a":"%s%s"}' % (b"x" * (LONGEST - 100), "𝄞".encode()),
        "one wide letter as an escape": b'{"a":"%s%s"}' % (b"x" * (LONGEST - 100), b"\\ud834\\udd1e"),
        "wide letters as far as they may be": b'{"a":"%s%s"}' % (b"x" * (PLAIN - 100), "𝄞".encode()),
        "long numbers": b'{"a":[%s]}' % b",".join([b"9" * 4000] * 4000),
        "fractions": b'{"a":[%s]}' % b",".join([b"1." + b"3" * 20] * 600_000),
        "too many": {f"t{i}": tensor(shape=[0], offsets=(0, 0)) for i in range(MOST + 1)},
        "metadata no dict": {"__metadata__": 5},
        "metadata no texts": {"__metadata__": {"a": 5}},
        "entry no dict": {"a": 5},
        "entry empty": {"a": {}},
        "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
        "more": {"a": tensor(code="import os")},
        "dtype unknown": {"a": tensor("F33")},
        "dtype a list": {"a": tensor(["F32"])},
        "dtype none": {"a": tensor(None)},
        "shape a text": {"a": {**tensor(), "shape": "2"}},
        "shape of texts": {"a": tensor(shape=["2"])},
        "shape of fractions": {"a": tensor(shape=[2.0])},
        "shape of truths": {"a": tensor(shape=[True, 2])},
        "shape nested": {"a": tensor(shape=[[2]])},
        "negative": {"a": tensor(shape=[-2])},
        "two negatives": {"a": tensor(shape=[-1, -2])},
        "huge and empty": {"a": tensor(shape=[2**62, 0], offsets=(0, 0))},
        "overflowing": {"a": tensor(shape=[2**32, 2**32, 2])},
        "empty side": {"a": tensor(shape=[4, 0], offsets=(0, 0))},
        "deep": {"a": tensor(shape=[2] + [1] * 8)},
        "a shape too large": {"a": tensor(shape=[3])},
        "a shape too small": {"a": tensor(shape=[1])},
        "offsets one": {"a": tensor(offsets=[0])},
        "offsets three": {"a": tensor(offsets=[0, 4, 8])},
        "offsets of texts": {"a": tensor(offsets=["0", "8"])},
        "offsets negative": {"a": tensor(offsets=[-8, 0])},
        "offsets backwards": {"a": tensor(offsets=[8, 0])},
        "offsets beyond": {"a": tensor(offsets=[8, 16])},
        "offsets huge": {"a": tensor(offsets=[2**63, 2**63 + 8])},
        "overlap": {"a": tensor(shape=[1], offsets=(0, 4)), "b": tensor(shape=[1], offsets=(2, 6))},
        "same place": {"a": tensor(), "b": tensor()},
        "hole": {"a": tensor(shape=[1], offsets=(0, 4)), "b": tensor("F16", [1], (6, 8))},
        "too little": {"a": tensor(shape=[1], offsets=(0, 4))},
        "too much": {"a": tensor(shape=[4], offsets=(0, 16))},
        "name of a terminal": {"\x1b[2J": tensor()},
        "name with NUL": {"a\0": tensor()},
        "name a surrogate": b'{"\\ud800":%s}' % json.dumps(tensor()).encode(),
        "name long": {"a" * 300: tensor()},
        "no tensors": {"__metadata__": {}},
        "another model": {"transformer_blocks.0.attn.to_q.weight": tensor()},
    }
    return {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in bad.items()}


def fuzzed(whole: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its header's bits flipped, bytes moved or put in, its length changed, or its end gone."""
    length = int.from_bytes(whole[:8], "little")
    head, data = bytearray(whole[: 8 + length]), whole[8 + length :]
    for _ in range(chance.choice((1, 1, 2, 5, 50))):
        place = chance.randrange(len(head))
        match chance.randrange(5):
            case 0:
                head[place] ^= 1 << chance.randrange(8)
            case 1:
                head[place : place + chance.randrange(20)] = head[chance.randrange(len(head)) :][: chance.randrange(20)]
            case 2:
                head[place : place + 1] = chance.choice(
                    (b"[", b"]", b"{", b"}", b'"', b",", b":", b"9" * 30, b"\\u0000")
                )
            case 3:
                head[:8] = chance.choice((0, 1, length - 1, length + 1, 2**24, 2**62, 2**64 - 1)).to_bytes(8, "little")
            case _:
                data = data[: chance.randrange(len(data) + 1)]
    return bytes(head) + data
