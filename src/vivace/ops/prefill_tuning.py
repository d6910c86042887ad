"""Which kernel and which tile a product of the prefill runs on: rows chosen by measurement, and a rule for the rest.

A row holds for one epilogue, weight shape and format, up to a number of rows M; its comment is what chose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .prefill_attention import AttentionTile
from .prefill_gemm import Tile

MIDDLING = AttentionTile(64, 64, warps=4, stages=2)
PATCH_TILE = Tile(64, 128, 64, warps=4, stages=5)


@dataclass(frozen=True)
class Choice:
    """How to run one product.

    tile      a Triton tile, or None = cuBLASLt and a row-wise kernel
    measured  somebody compared; False: a rule for shapes that nobody measured
    """

    tile: Tile | None
    measured: bool = True


@dataclass(frozen=True)
class Key:
    """epilogue, weight rows and columns, whether E4M3."""

    epilogue: str
    rows: int
    columns: int
    fp8: bool


@dataclass(frozen=True)
class Tuning:
    """products  {key: ((largest M, choice), ...) in ascending M}; beyond the last row the last choice holds.

    ahead_bytes  weights up to this size are fetched into L2 by the kernel before their product (`prefill_ahead`)
    prefer_blas  a shape that is not in `products` goes to cuBLAS wherever that can run it
    """

    products: Mapping[Key, tuple[tuple[int, Choice], ...]] = field(default_factory=dict)
    attention: tuple[tuple[int, AttentionTile], ...] = ((1 << 30, MIDDLING),)
    vision_tile: AttentionTile = MIDDLING
    patch_tile: Tile = PATCH_TILE
    early: tuple[str, ...] = ("vision",)
    ahead_bytes: int = 0
    prefer_blas: bool = False

    def choose(self, epilogue: str, *, rows: int, shape: tuple[int, ...], fp8: bool) -> Choice:
        """The choice for x [rows, K] and a weight of `shape` [N, K]."""
        known = self.products.get(Key(epilogue, shape[0], shape[1], fp8))
        if known is None:
            return untuned(epilogue, fp8=fp8, prefer_blas=self.prefer_blas)
        return next((choice for limit, choice in known if rows <= limit), known[-1][1])

    def choose_int8(self, epilogue: str, *, rows: int, shape: tuple[int, ...], processors: int) -> Choice:
        """The choice for an INT8 weight [N, K]: large tiles where they fill the chip, as they read the operands less often.

        Never cuBLAS, whose result would be the sums in 32 bits.
        """
        pairs = 2 if epilogue in ("geglu", "qkv_rope") else 1
        tiles = -(-rows // 128) * -(-shape[0] // 128)
        if tiles >= 0.75 * processors:
            return Choice(Tile(128, 128 // pairs, 128, warps=8, stages=3), measured=False)
        return Choice(Tile(64, 64 // pairs, 128, warps=4, stages=4), measured=False)

    def attention_tile(self, *, rows: int) -> AttentionTile:
        """Tile of the prefix attention for `rows` = tokens * heads."""
        return next((tile for limit, tile in self.attention if rows <= limit), self.attention[-1][1])


def untuned(epilogue: str, *, fp8: bool, prefer_blas: bool = False) -> Choice:
    """For shapes that nobody measured: cuBLAS where it needs no epilogue of ours, else a middling tile that always fits.

    prefer_blas  cuBLAS and a row-wise kernel for all but E4M3 products that it would have to finish: torch scales rows and
                 channels together on few GPUs
    """
    left_to_a_kernel = ("parts", "geglu", "qkv_rope")
    if (epilogue in left_to_a_kernel or not fp8) if prefer_blas else epilogue in ("plain", "parts"):
        return Choice(None, measured=False)
    block_n = 32 if epilogue == "qkv_rope" else 64
    return Choice(Tile(64, block_n, 128 if fp8 else 64, warps=4, stages=3), measured=False)


def _own(
    block_m: int, block_n: int, block_k: int, warps: int, stages: int, *, split_k: int = 1, bulk: bool = False,
    tail: int = 0, group: int = 1,
) -> Choice:  # fmt: skip
    return Choice(
        Tile(block_m, block_n, block_k, warps, stages, split_k=split_k, bulk_store=bulk, tail=tail, group=group)
    )


BLAS = Choice(None)
# us on an H100 at the row's M: chosen (the other engine), both with whatever kernel they need beside them.
# Run: benchmarks/results/prefill-h100-2026-11-24.json; "25th": prefill-tail-h100-2026-11-25.json, all candidates in turn
_PRODUCTS: dict[Key, tuple[tuple[int, Choice], ...]] = {
    # prefix, M = 304, 560, 968; 25th: 304, 512, 560, 784, 968
    Key("qkv_rope", 2560, 2048, fp8=False): (
        (304, _own(64, 64, 64, 4, 4)),  # 25th: 13.0 (14.3)
        (968, BLAS),  # 14.7 (15.6), 20.8 (25.2); 25th: 512 13.7 (14.7), 784 17.3 (18.8)
    ),
    Key("qkv_rope", 2560, 2048, fp8=True): (
        (784, _own(64, 64, 128, 4, 4)),  # 9.2 (10.5), 10.6 (11.3); 25th: 784 11.9 (13.2; with 3 stages 14.7)
        (968, _own(64, 64, 128, 4, 3)),  # 15.4 (15.6)
    ),
    Key("qkv_rope", 512, 2048, fp8=False): ((968, BLAS),),  # the last layer's keys and values: once a prefill
    Key("qkv_rope", 512, 2048, fp8=True): ((968, _own(64, 64, 128, 4, 4)),),
    Key("parts", 2048, 2048, fp8=False): (
        (448, BLAS),  # 8.4 (9.5)
        (512, _own(64, 128, 64, 4, 5, bulk=True)),  # 25th: 9.7 (10.9, 13.6)
        (640, BLAS),  # 12.0 (12.9)
        (784, _own(128, 128, 64, 4, 4, bulk=True)),  # 25th: 14.3 (14.6)
        (968, BLAS),  # 14.2 (14.0)
    ),
    Key("parts", 2048, 2048, fp8=True): (
        (448, BLAS),  # 5.8 (5.9)
        (512, _own(64, 128, 128, 4, 5, bulk=True)),  # 25th: 5.9 (6.8)
        (560, BLAS),  # 7.6 (8.1)
        (968, _own(128, 128, 128, 4, 4, bulk=True)),  # 8.6 (9.7)
    ),
    Key("geglu", 32768, 2048, fp8=False): (
        (448, BLAS),  # 25th: 76.9 (79.6 with a tail of 32, 92.1 without)
        (512, _own(128, 128, 64, 8, 4)),  # 25th: 107.6 (115.6)
        (784, BLAS),  # 25th: 560 131.8 (134.0 with a tail of 64), 784 187.7 (201.9 with a tail of 16)
        # 25th: 230.7 (252.8) on a hot chip; 24th: 195.6, 205.4, 210.6 (229.1, 230.8, 234.6), three runs
        (968, _own(128, 128, 64, 8, 4)),
    ),
    Key("geglu", 32768, 2048, fp8=True): (
        (304, _own(128, 128, 128, 8, 4, tail=32, group=32)),  # 25th: 44.6 (46.7; 52.2 without a tail)
        (448, BLAS),
        (512, _own(128, 128, 128, 8, 4)),  # 25th: 63.8 (71.4)
        (576, _own(128, 128, 128, 8, 3, tail=64, group=32)),  # 25th: 77.8 (81.2; 83.1 without a tail)
        (784, BLAS),  # 25th: 109.7 (111.3 with a tail of 16, 114.6 without)
        # 25th: 132.3 (135.7) on a hot chip; 24th: 117.8, 123.9, 124.4 (125.1, 127.0, 124.2), and no 63 MB of scratch
        (968, _own(128, 128, 128, 8, 4)),
    ),
    Key("parts", 2048, 16384, fp8=False): ((968, BLAS),),  # 43.8 (52.6), 58.3 (83.0), 87.1 (94.1)
    Key("parts", 2048, 16384, fp8=True): ((968, BLAS),),  # 26.3 (29.6), 35.2 (44.8), 45.7 (48.3)
    # SigLIP, M = 256, 512, 768
    Key("plain", 3456, 1152, fp8=False): (
        (256, _own(64, 64, 64, 4, 4, bulk=True)),  # 7.9 (8.1)
        (512, BLAS),  # 9.9 (11.6)
        (768, _own(64, 128, 64, 4, 3, bulk=True)),  # 13.2 (13.7)
    ),
    Key("plain", 3456, 1152, fp8=True): (
        (256, _own(64, 64, 128, 4, 4)),  # 5.2 (8.0)
        (512, _own(64, 64, 128, 4, 3, bulk=True)),  # 25th: 6.8 (8.2; 64 x 128 columns 7.5)
        (768, _own(64, 128, 128, 4, 3, bulk=True)),  # 8.9 (11.2)
    ),
    Key("parts", 1152, 1152, fp8=False): (
        (256, _own(64, 64, 64, 4, 6)),  # 5.5 (5.7)
        (768, _own(64, 128, 64, 4, 5, bulk=True)),  # 6.3 (6.3), 6.6 (7.6)
    ),
    Key("parts", 1152, 1152, fp8=True): (
        (256, _own(64, 64, 128, 4, 6)),  # 3.6 (4.6)
        (768, _own(64, 128, 128, 4, 5, bulk=True)),  # 4.0 (5.0), 4.2 (5.6)
    ),
    Key("gelu", 4304, 1152, fp8=False): (
        (256, _own(64, 64, 64, 4, 4, bulk=True)),  # 9.9 (10.1)
        (768, BLAS),  # 12.5 (14.7), 15.5 (17.0)
    ),
    Key("gelu", 4304, 1152, fp8=True): (  # cuBLAS has no GELU from and to E4M3
        (256, _own(64, 64, 128, 4, 4)),  # 6.9
        (512, _own(64, 128, 128, 4, 3, bulk=True)),  # 10.2
        (768, _own(128, 128, 128, 8, 3, bulk=True)),  # 12.2
    ),
    Key("parts", 1152, 4304, fp8=False): (
        (256, _own(64, 128, 64, 4, 5, split_k=3)),  # 25th: 10.0 (11.1), the norm's parts included
        (512, BLAS),  # 13.0 (15.0)
        (768, _own(128, 128, 64, 4, 4, split_k=2)),  # 19.6 (22.7), the norm's second part included
    ),
    Key("parts", 1152, 4304, fp8=True): ((768, BLAS),),  # 8.3 (9.1), 12.4 (12.8), 15.2 (16.2)
    Key("plain", 2048, 1152, fp8=False): ((768, BLAS),),  # projector: 6.0 (7.8), 7.8 (8.7), 8.9 (9.7)
    Key("plain", 2048, 1152, fp8=True): (
        (768, _own(64, 128, 128, 4, 4, bulk=True)),
    ),  # 5.2 (7.7), 6.0 (7.7), 6.6 (8.3)
}

# no GPU but Hopper was measured: of a program's shared memory, as compiled for 8.0 to 12.0, these take 102 and 70 KB
_ATTENTION_ELSEWHERE = AttentionTile(64, 32, warps=4, stages=3), AttentionTile(64, 32, warps=4, stages=2)


def tuning_for(capability: tuple[int, int], *, shared_bytes: int | None) -> Tuning:
    """`TUNED` on Hopper, where its rows were measured; elsewhere cuBLAS, and attention cut for the memory that there is."""
    if capability[0] == 9:
        return TUNED
    roomy, small = _ATTENTION_ELSEWHERE
    cut = small if shared_bytes is not None and shared_bytes < 104 * 1024 else roomy
    return Tuning(attention=((1 << 30, cut),), vision_tile=TUNED.vision_tile, prefer_blas=True)


TUNED = Tuning(
    products=_PRODUCTS,
    attention=(
        (1 << 30, AttentionTile(64, 64, warps=4, stages=3)),
    ),  # 20.8 us, with a key mask 22.9; cuDNN 30.3 and 65.0
    vision_tile=AttentionTile(64, 128, warps=4, stages=2),  # 7.0 us; cuDNN with its copies 10.5
)
