"""The codecs: what they keep, what they cost, and what they refuse."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbt_app.codec import codec as codec_module
from fedbt_app.codec.codec import decode, encode
from fedbt_app.codec.formats import BLOCK, CODECS
from fedbt_app.errors import FedBTError

PLAIN = [name for name in CODECS if not name.endswith("+zstd")]
QUANTISED = ["int8", "int4", "int2"]
BF16_ERROR = 2.0**-8
SMALLEST = 2.0**-133  # of bfloat16; below it the lossy codecs may lose a value

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.sampled_from(
    [(), (0,), (1,), (1, 1), (1, 31), (1, 32), (1, 33), (5, 13), (2, 64), (0, 7), (3, 0, 2)]
)
LARGEST = 2.0**100  # 1.3e30
moderate = st.floats(width=32, min_value=-LARGEST, max_value=LARGEST)  # subnormals included


@st.composite
def tensor_dicts(draw, elements=moderate):
    def tensor(shape):
        size = math.prod(shape)
        fill = draw(st.none() | elements)  # constant tensors now and then
        values = (
            [fill] * size
            if fill is not None
            else draw(st.lists(elements, min_size=size, max_size=size))
        )
        return torch.tensor(values, dtype=torch.float32).reshape(shape)

    names = draw(st.lists(st.text(max_size=6), unique=True, max_size=4))
    return {name: tensor(draw(shapes)) for name in names}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def round_trip(tensors, codec):
    encoded = encode(tensors, codec)
    return decode(encoded.arrays, encoded.header, shapes_of(tensors))


def sample(scale=1e-3):
    g = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randn(24, 40, generator=g) * scale,
        "bias": torch.randn(24, generator=g) * scale,
        "odd": torch.randn(3, 11, generator=g) * scale,
    }


def blocks_of(tensor):
    return tensor.reshape(-1).split(BLOCK) if tensor.numel() else ()


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def assert_within_bound(sent, received, codec):
    """Within half a step of the block; its step cannot exceed what the largest element needs."""
    bits = CODECS[codec].bits
    if bits == 32:
        assert same_bits(sent, received)
        return
    if bits == 16 or sent.ndim < 2:
        assert (
            ((sent - received).abs() <= sent.abs() * BF16_ERROR) | (sent.abs() < 2.0**-126)
        ).all()
        assert (sent - received).abs()[sent.abs() < 2.0**-126].le(SMALLEST).all()
        return
    for x, y in zip(blocks_of(sent), blocks_of(received), strict=True):
        error, largest = (x - y).abs().double(), x.abs().max().double()
        if bits > 2:
            step = largest / 2 ** (bits - 1) * (1 + 2 * BF16_ERROR) + SMALLEST
            assert (error <= step / 2 * (1 + 1e-5)).all()
        else:  # y holds +-step/2 and +-3 step/2, so step is known to a factor: test_int2_levels
            assert (error <= largest * (1 + 2 * BF16_ERROR) + SMALLEST).all()
            assert error.square().sum() <= x.double().square().sum() + len(x) * SMALLEST**2


@settings(max_examples=60, deadline=None)
@given(tensors=tensor_dicts())
def test_round_trip_is_within_the_bound(tensors):
    for codec in CODECS:
        received = round_trip(tensors, codec)
        assert list(received) == list(tensors)
        for name, tensor in tensors.items():
            assert received[name].dtype == torch.float32
            assert received[name].shape == tensor.shape
            assert received[name].isfinite().all()
            assert_within_bound(tensor, received[name], codec)


@settings(max_examples=60, deadline=None)
@given(tensors=tensor_dicts(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_float32_is_bit_exact(tensors):
    for codec in ("float32", "float32+zstd"):
        received = round_trip(tensors, codec)
        assert all(same_bits(tensor, received[name]) for name, tensor in tensors.items())


def test_float32_keeps_minus_zero_and_subnormals():
    tensor = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, 1.1e-38, 3.4028235e38])
    assert same_bits(round_trip({"t": tensor}, "float32+zstd")["t"], tensor)


def test_relative_error_does_not_depend_on_the_scale():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).double()
    bounds = {"int8": 0.0065, "int4": 0.095, "int2": 0.36}
    for codec, scale in product(QUANTISED, (1e30, 1.0, 1e-8, 1e-30, 1e-36)):
        sent = (x * scale).float()
        received = round_trip({"t": sent}, codec)["t"]
        error = (received.double() - sent.double()).norm() / sent.double().norm()
        assert error < bounds[codec], (codec, scale)


def test_zeros_decode_to_zeros():
    sent = torch.zeros(4, BLOCK)
    sent[2] = torch.linspace(-1, 1, BLOCK)
    for codec in CODECS:
        received = round_trip({"t": sent, "none": torch.zeros(3, 5)}, codec)
        assert torch.equal(received["t"][[0, 1, 3]], torch.zeros(3, BLOCK)), codec
        assert torch.equal(received["none"], torch.zeros(3, 5)), codec


def test_every_level_comes_back_in_its_place():
    for codec in QUANTISED:
        half = 2 ** (CODECS[codec].bits - 1)
        levels = torch.arange(-half, half) + 0.5
        if half > 2:  # an outer edge in each block makes its step one
            sent = torch.cat(
                [torch.cat([torch.tensor([float(half)]), part]) for part in levels.split(BLOCK - 1)]
            )
        else:
            sent = levels.repeat(BLOCK // 4)
        expected = sent.where(sent.abs() < half, half - 0.5)
        assert torch.equal(round_trip({"t": sent[None]}, codec)["t"], expected[None]), codec


def test_int2_levels():
    """Four levels, nearest first: only beyond two steps is an element off by more than half one."""
    sent = torch.randn(100, BLOCK, generator=torch.Generator().manual_seed(1))
    encoded = encode({"t": sent}, "int2")
    received = decode(encoded.arrays, encoded.header, {"t": (100, BLOCK)})["t"]
    step = torch.from_numpy(encoded.arrays["values"]).view(torch.bfloat16).float()[:, None]
    error = (sent - received).abs() / step
    assert (received / step).unique().tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert (error <= 0.5 + 1e-5)[sent.abs() <= 2 * step].all()
    assert ((sent.abs() > 2 * step).float().mean()) < 0.1


def test_error_feedback_keeps_the_residual_bounded():
    for codec in QUANTISED:
        g = torch.Generator().manual_seed(2)
        drift, residual = torch.randn(64, 64, generator=g), torch.zeros(64, 64)
        norms = []
        for _ in range(20):
            wanted = residual + drift + torch.randn(64, 64, generator=g)
            residual = wanted - round_trip({"t": wanted}, codec)["t"]
            norms.append(residual.norm().item())
        assert max(norms[10:]) < 1.35 * norms[0], codec


def test_an_outlier_does_not_make_its_block_worse_than_zeros():
    sent = torch.zeros(1, BLOCK)
    sent[0, 3] = 1.0
    for codec in ("int4", "int2"):
        assert (round_trip({"t": sent}, codec)["t"] - sent).norm() < 1, codec


def test_passes_and_blocks_split_alike(monkeypatch):
    tensors = {"t": torch.randn(13, 37, generator=torch.Generator().manual_seed(5))}
    whole = encode(tensors, "int4")
    expected = decode(whole.arrays, whole.header, shapes_of(tensors))
    monkeypatch.setattr(codec_module, "CHUNK", 2 * BLOCK)
    parts = encode(tensors, "int4")
    assert all(np.array_equal(whole.arrays[name], parts.arrays[name]) for name in whole.arrays)
    assert torch.equal(decode(parts.arrays, parts.header, shapes_of(tensors))["t"], expected["t"])


def test_equal_input_gives_equal_bytes_and_leaves_it_alone():
    for codec in CODECS:
        first, second, tensors = encode(sample(), codec), encode(sample(), codec), sample()
        encode(tensors, codec)
        assert first.header == second.header
        assert all(
            first.arrays[name].tobytes() == second.arrays[name].tobytes() for name in first.arrays
        )
        assert all(torch.equal(tensors[name], tensor) for name, tensor in sample().items())


@pytest.mark.filterwarnings("error")
def test_results_own_their_memory_and_read_only_arrays_are_accepted():
    tensors = {"t": torch.randn(8, 8), "p": torch.nn.Parameter(torch.randn(8, 8).t())}
    encoded = encode(tensors, "float32")
    frozen = {
        name: np.frombuffer(array.tobytes(), array.dtype) for name, array in encoded.arrays.items()
    }
    received = decode(frozen, encoded.header, shapes_of(tensors))
    received["t"].zero_()
    assert torch.equal(decode(frozen, encoded.header, shapes_of(tensors))["t"], tensors["t"])
    assert torch.equal(received["p"], tensors["p"].detach())


def bert_base_block():
    g = torch.Generator().manual_seed(0)
    h, f = 768, 3072
    dense = {f"attention.self.{part}": (h, h) for part in ("query", "key", "value")}
    dense |= {
        "attention.output.dense": (h, h),
        "intermediate.dense": (f, h),
        "output.dense": (h, f),
    }
    shapes = {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    shapes |= {f"{name}.{kind}": (h,) for name in norms for kind in ("weight", "bias")}
    return {name: torch.randn(shape, generator=g) * 1e-3 for name, shape in shapes.items()}


def test_size_of_a_bert_base_block():
    block = bert_base_block()
    parameters = sum(tensor.numel() for tensor in block.values())
    assert (len(block), parameters) == (16, 7_087_872)
    bounds = {"float32": 32.01, "bf16": 16.01, "int8": 8.6, "int4": 4.6, "int2": 2.6}
    bounds |= {
        "float32+zstd": 30.0,
        "bf16+zstd": 14.0,
        "int8+zstd": 8.3,
        "int4+zstd": 4.3,
        "int2+zstd": 2.35,
    }
    assert set(bounds) == set(CODECS)
    for codec, bound in bounds.items():
        arrays, header = encode(block, codec)
        assert len(arrays) == (2 if codec.startswith("int") else 1)
        assert (
            8 * (sum(array.nbytes for array in arrays.values()) + len(header)) / parameters <= bound
        ), codec


def test_encode_refuses_what_is_not_finite():
    for codec, bad in product(CODECS, (math.nan, math.inf, -math.inf)):
        tensors = sample()
        tensors["odd"][2, 10] = bad
        with pytest.raises(FedBTError, match="'odd'"):
            encode(tensors, codec)


def test_encode_refuses_other_tensors():
    whole = torch.zeros(3, 3)
    for tensor in (whole.double(), whole.int(), torch.zeros(3, device="meta"), whole.to_sparse()):
        with pytest.raises(FedBTError, match="'t'"):
            encode({"t": tensor}, "float32")


def test_encode_refuses_overflow_and_unknown_codecs():
    with pytest.raises(FedBTError, match="'t'"):
        encode({"t": torch.full((2, 2), 1e36)}, "int8")
    with pytest.raises(FedBTError, match="int3"):
        encode(sample(), "int3")


def refuses(arrays, header, shapes, match=None):
    with pytest.raises(FedBTError, match=match) as caught:
        decode(arrays, header, shapes)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_decode_refuses_other_names_and_shapes():
    shapes = shapes_of(sample())
    for codec in CODECS:
        arrays, header = encode(sample(), codec)
        refuses(arrays, header, shapes | {"more": (2,)}, "'more'")
        refuses(arrays, header, {name: shapes[name] for name in ("weight", "bias")}, "'odd'")
        refuses(arrays, header, shapes | {"weight": (24, 41)})
        refuses(arrays, header, shapes | {"bias": (10**9,)})
        refuses(arrays, header, {})
        fields = json.loads(header)
        refuses(arrays, json.dumps(fields | {"names": ["weight", "bias", "bias"]}), shapes, "twice")
        refuses(
            arrays,
            json.dumps(fields | {"names": ["weight", "bias", "a\nb" * 999]}),
            shapes,
            "not asked for",
        )
        refuses(
            arrays,
            json.dumps(fields | {"names": ["weight", "bias", "\ud800"]}),
            shapes,
            "not asked for",
        )


def test_decode_refuses_other_headers():
    arrays, header = encode(sample(), "int4")
    for change in (
        *({"format": other} for other in (2, "1", None)),
        *({"codec": other} for other in ("int3", ["int4"], None)),
        *({"block": other} for other in (64, 0)),
        *(
            {"names": other}
            for other in (None, "weight", [1, 2, 3], {"weight": 1}, ["weight", "bias", ["odd"]])
        ),
        {"vectors": "int4"},
        {"extra": 1},
    ):
        refuses(arrays, json.dumps(json.loads(header) | change), shapes_of(sample()))


def test_decode_refuses_what_is_no_header():
    arrays = encode(sample(), "int4").arrays
    for header in (
        "",
        "[]",
        "1",
        "null",
        "{}",
        "NaN",
        "[" * 100_000,
        "9" * 5000,
        '{"format":1}',
        None,
    ):
        refuses(arrays, header, shapes_of(sample()))


def test_a_deep_header_is_refused_as_such():
    arrays, header = encode(sample(), "int4")
    for depth in (100, 900, 5000):
        deep = "[" * depth + "]" * depth
        for key in ("codec", "names", "format", "vectors"):
            fields = json.loads(header)
            del fields[key]
            refuses(arrays, json.dumps(fields)[:-1] + f', "{key}": {deep}}}', shapes_of(sample()))


def test_decode_refuses_other_arrays():
    shapes = shapes_of(sample())
    for codec in CODECS:
        arrays, header = encode(sample(), codec)
        refuses(arrays | {"more": np.zeros(1, np.uint8)}, header, shapes)
        for name, array in arrays.items():
            refuses({other: arrays[other] for other in arrays if other != name}, header, shapes)
            others = [
                array[:-1],
                array[:0],
                np.append(array, array[:1]),
                array[None],
                array.astype(np.float64),
            ]
            others += [
                array.view(np.int8),
                array.astype(">u4"),
                array.tobytes(),
                array.astype(object),
                None,
            ]
            for other in others:
                refuses(arrays | {name: other}, header, shapes)


def test_decode_refuses_values_that_are_not_finite():
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    for codec in PLAIN:
        arrays, header = encode(sample(), codec)
        bits = bad.numpy() if codec == "float32" else bad.bfloat16().view(torch.uint16).numpy()
        for place in range(len(arrays["values"])):
            values = arrays["values"].copy()
            values[place] = bits[place % 3]
            refuses(arrays | {"values": values}, header, shapes_of(sample()), "weight|bias|odd")


def test_decode_refuses_negative_and_overflowing_steps():
    for codec, step in product(QUANTISED, (-1e-3, 3e38, 1e37)):
        arrays, header = encode(sample(), codec)
        arrays["values"][5] = torch.tensor(step).bfloat16().view(torch.uint16).numpy()
        refuses(arrays, header, shapes_of(sample()), "'weight'")


def frame(data, **options):
    return np.frombuffer(zstandard.ZstdCompressor(**options).compress(data), np.uint8)


def test_decode_refuses_size_bombs(monkeypatch):
    tensors = {"t": torch.zeros(64, 64)}
    arrays, header = encode(tensors, "int8+zstd")
    good, shapes = np.zeros(64 * 64, np.uint8).tobytes(), shapes_of(tensors)
    assert decode({**arrays, "codes": frame(good)}, header, shapes)["t"].shape == (64, 64)

    lying = frame(bytes(1 << 24)).copy()  # states 2**24, made to state 4096
    stated = (1 << 24).to_bytes(4, "little")
    at = lying.tobytes().index(stated)
    lying[at : at + 4] = np.frombuffer((64 * 64).to_bytes(4, "little"), np.uint8)
    assert zstandard.get_frame_parameters(lying.tobytes()).content_size == 64 * 64
    short = frame(bytes(64 * 64 - 300)).copy()  # such sizes are stated less 256
    at = short.tobytes().index((64 * 64 - 300 - 256).to_bytes(2, "little"))
    short[at : at + 2] = np.frombuffer((64 * 64 - 256).to_bytes(2, "little"), np.uint8)
    assert zstandard.get_frame_parameters(short.tobytes()).content_size == 64 * 64
    tail = np.concatenate([frame(good), frame(good)])
    for bad in (lying, short, tail, frame(good)[:-1]):
        refuses({**arrays, "codes": bad}, header, shapes, "codes")

    class Unreachable:
        def __init__(self, *args, **kwargs):
            raise AssertionError("decompressed before the size was checked")

    monkeypatch.setattr(codec_module.zstandard, "ZstdDecompressor", Unreachable)
    codes = [
        frame(bytes(1 << 30)),
        frame(good, write_content_size=False),
        frame(good[:-1]),
        frame(b""),
    ]
    for bad in codes:
        refuses(
            {**arrays, "values": arrays["values"], "codes": bad} | {"values": bad}, header, shapes
        )


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=75, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(codec, data):
    tensors = sample()
    arrays, header = encode(tensors, codec)
    arrays = dict(arrays)
    part = data.draw(st.sampled_from([*arrays, "header"]))
    raw = bytearray(header.encode() if part == "header" else arrays[part].tobytes())
    cut = data.draw(st.booleans())
    place = data.draw(st.integers(0, len(raw) - 1))
    if cut:
        del raw[place : place + data.draw(st.integers(1, 8))]
    else:
        raw[place] ^= data.draw(st.integers(1, 255))
    if part == "header":
        header = raw.decode("latin-1")
    else:
        dtype = arrays[part].dtype
        arrays[part] = np.frombuffer(
            bytes(raw[: len(raw) // dtype.itemsize * dtype.itemsize]), dtype
        )
    try:
        received = decode(arrays, header, shapes_of(tensors))
    except FedBTError:
        return
    assert not cut or part == "header"
    assert shapes_of(received) == shapes_of(tensors)
    assert all(tensor.isfinite().all() for tensor in received.values())
    if codec.endswith("+zstd") and part != "header":  # the checksum saw it, or it hit an unused bit
        expected = round_trip(tensors, codec)
        assert all(torch.equal(received[name], expected[name]) for name in expected)


def test_nothing_asked_for_and_nothing_sent():
    for codec in CODECS:
        encoded = encode({}, codec)
        assert encoded.arrays == {}
        assert decode({}, encoded.header, {}) == {}
