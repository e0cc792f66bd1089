"""How weights lie for the one-launch layer, and whether GPUs of several sizes have room for it. No kernel runs here."""

from __future__ import annotations

import pytest
import torch

from multitensor.formats.quant_types import QUANT_TYPES
from multitensor.kernels.cuda.layer import LayerPhases, LayerShape, Matrices, Places, mail_bytes, places_bytes
from multitensor.kernels.cuda.layer_weights import FloatRows, Tiles, ways_to_lie
from multitensor.kernels.cuda.tiles import TILE_BYTES, TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor

SHARED = {"7.5": 64 << 10, "8.0": 163 << 10, "8.6": 99 << 10, "9.0": 227 << 10}  # bytes of a block, by capability
NORM = torch.ones(1)


def rows_of(name: str, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> QuantTensor:
    return QuantTensor(QUANT_TYPES[name], rows, cols, {"weight": torch.empty(1, dtype=dtype).expand(rows, cols)})


def plane(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> QuantTensor:
    return QuantTensor(QUANT_TYPES["BF16"], rows, cols, {"weight": torch.zeros(rows, cols, dtype=dtype)})


def tiled(name: str, rows: int = 16, cols: int = 256) -> TiledTensor:
    tiles = torch.zeros(-(-rows // 16), -(-cols // 256), TILE_BYTES[name], dtype=torch.uint8)
    return TiledTensor(QUANT_TYPES[name], rows, cols, {"tiles": tiles})


def phases(hidden: int, attention: int, ffn: int, following: int) -> LayerPhases:
    """Of a model's dimensions; the planes hold one number, only shapes matter."""

    def one(rows: int, cols: int) -> QuantTensor:
        return rows_of("BF16", rows, cols)

    products = (one(hidden, attention),), (one(ffn, hidden), one(ffn, hidden)), (one(hidden, ffn),)
    matrices = [Matrices(weights) for weights in (*products, (one(following, hidden),))]
    return LayerPhases(*matrices, NORM, NORM, None, None, logits=True)


def test_tiles_of_up_to_four_types() -> None:
    assert ways_to_lie([tiled("Q4_K"), tiled("Q4_K")]) == (Tiles(("Q4_K",)),)
    assert Tiles(("Q4_K",)).defines() == {"TYPE": "Q4_K", "TYPE_B": "Q4_K"}
    (both,) = ways_to_lie([tiled("Q4_K"), tiled("Q6_K"), tiled("Q4_K")])
    assert both == Tiles(("Q4_K", "Q6_K"))
    assert both.kinds([tiled("Q4_K"), tiled("Q6_K"), tiled("Q6_K")]) == 0b010100
    assert both.defines() == {"TYPE": "Q4_K", "TYPE_B": "Q6_K"}
    names = ("Q4_K", "Q6_K", "Q8_0", "Q5_0")
    (four,) = ways_to_lie([tiled(name) for name in names])
    assert four.kinds([tiled("Q5_0"), tiled("Q4_K"), tiled("Q8_0")]) == 0b100011
    assert four.defines() == dict(zip(("TYPE", "TYPE_B", "TYPE_C", "TYPE_D"), names, strict=True)) | {"TYPES": 4}
    assert four.stage_bytes == max(TILE_BYTES[name] for name in names)
    assert ways_to_lie([tiled(name) for name in (*names, "Q3_K")]) == ()


def test_float_rows_of_one_type() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        ways = ways_to_lie([plane(16, 64, dtype), plane(5, 8, dtype)])
        assert ways and all(isinstance(way, FloatRows) and way.dtype == dtype for way in ways)
        assert {str(way.defines()["WEIGHT_BFLOAT"]) for way in ways} == {str(dtype == torch.bfloat16).lower()}


@pytest.mark.parametrize(
    "weights",
    [
        [plane(16, 64), plane(16, 64, torch.float16)],
        [plane(16, 64, torch.float32)],
        [plane(16, 64), tiled("Q4_K")],
        [tiled("Q4_K"), plane(16, 64)],
        [plane(16, 60)],  # rows that 16-byte copies do not meet
        [rows_of("BF16", 16, 64)],  # not contiguous
    ],
)
def test_what_cannot_be_read_alike(weights: list[QuantTensor]) -> None:
    assert ways_to_lie(weights) == ()


def test_a_view_that_starts_between_copies_is_left_alone() -> None:
    inside = torch.zeros(16 * 64 + 4, dtype=torch.bfloat16)[4:].view(16, 64)
    assert ways_to_lie([QuantTensor(QUANT_TYPES["BF16"], 16, 64, {"weight": inside})]) == ()


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    "model",
    [(4096, 4096, 14336, 128256), (4096, 2048, 7168, 64128), (8192, 4096, 14336, 64128), (576, 576, 1536, 49152)],
)
def test_float_layers_find_room(capability: str, tokens: int, model: tuple[int, int, int, int]) -> None:
    """8B over one and two GPUs, 70B over two, SmolLM2; the older GPUs with smaller tiles or fewer warps."""
    layer = phases(*model)
    ways = [FloatRows(torch.bfloat16, columns) for columns in (256, 128, 64)]
    shapes = [LayerShape.of([layer], tokens, 68, way) for way in ways]
    found = [(shape.lie, shape.warps(SHARED[capability])) for shape in shapes]
    room = [warps for _, warps in found if warps]
    # Two tokens' activations and the rings do not meet in the smallest memory; those GPUs take separate kernels.
    assert bool(room) != (capability == "7.5" and tokens == 2 and model[2] > 8192), found
    for shape, (_, warps) in zip(shapes, found, strict=True):
        assert shape.shared_bytes(warps) <= SHARED[capability] or warps == 0


@pytest.mark.parametrize("columns", [256, 128, 64])
@pytest.mark.parametrize("blocks", [1, 3, 132])
def test_lists_are_long_enough(columns: int, blocks: int) -> None:
    """Every block's tiles, dealt to its warps in turn anew in each product, as layer.cu does."""
    layer, lie, warps = phases(576, 200, 272, 1000), FloatRows(torch.bfloat16, columns), 6
    shape = LayerShape.of([layer], 1, blocks, lie)
    longest = 0
    for block in range(blocks):
        mine = 0
        for number, matrices in enumerate(layer.products):
            groups = [-(-w.rows // 16) for w in matrices.weights]
            jobs = len(range(block, groups[0] if number == 1 else sum(groups), blocks))
            tiles = jobs * -(-matrices.weights[0].cols // columns) * (2 if number == 1 else 1)
            mine += -(-tiles // warps)
        longest = max(longest, mine)
    assert longest <= shape.longest(warps) <= longest + 4  # the most of any block, product by product


def test_places_and_mail() -> None:
    assert places_bytes(4096, 2, 3) == 3 * 2 * 3 * 2 * 4096 * 4
    assert mail_bytes(4096, 2) == 4 * 2 * 2 * 4096 * 4
    assert Places(torch.zeros(3), None).ranks == 3
    assert Places(torch.zeros(4), None, relay=True).ranks == 3
