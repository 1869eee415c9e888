"""The paper's Tables 1 to 5 (Lu et al., ICIC 2025), as data: top-1 in percent.

Every number here is the paper's, none is ours. A row names the cell of ours that stands beside it (see `cells`), or
none where the method is not in this project; "-" is a number that the paper does not give. The numbers beside NORM are
those of its authors for NORM+KD, whose weight of KD they do not give: 1 is ours. Those beside TTM are its authors' for
TTM in Table 1, and in Table 2 those for its weighted form, WTTM; ours are TTM in both.
"""

from typing import NamedTuple

# The tables' columns: the name of the pair's config, and what the paper calls it.
PAIRS = {
    "cifar100_res56_res20": "resnet56 > resnet20",
    "cifar100_res32x4_res8x4": "resnet32x4 > resnet8x4",
    "cifar100_wrn40_2_wrn16_2": "wrn_40_2 > wrn_16_2",
    "cifar100_wrn40_2_wrn40_1": "wrn_40_2 > wrn_40_1",
    "cifar100_vgg13_vgg8": "vgg13 > vgg8",
    "cifar100_res110_res32": "resnet110 > resnet32",
    "cifar100_res32x4_sv2": "resnet32x4 > ShuffleV2",
    "cifar100_vgg13_mv2": "vgg13 > MobileNetV2",
    "cifar100_res50_mv2": "ResNet50 > MobileNetV2",
    "cifar100_wrn40_2_sv1": "wrn_40_2 > ShuffleV1",
    "cifar100_res32x4_sv1": "resnet32x4 > ShuffleV1",
    "tinyimagenet_res18_mv2": "ResNet18 > MobileNetV2",
    "tinyimagenet_res18_sv2": "ResNet18 > ShuffleV2",
}


class Row(NamedTuple):
    """A line of a table."""

    name: str  # as the paper has it
    cell: str  # ours; "": not implemented
    numbers: tuple[float | None, ...]  # the paper's, one for each pair


class Table(NamedTuple):
    """A table, or a part of one: its rows, and its columns by the names of their configs."""

    number: int
    title: str
    pairs: tuple[str, ...]
    rows: tuple[Row, ...]


def _rows(text: str) -> tuple[Row, ...]:
    lines = ([part.strip() for part in line.split("|")] for line in text.strip().splitlines())
    return tuple(
        Row(name, cell, tuple(None if x == "-" else float(x) for x in numbers.split())) for name, cell, numbers in lines
    )


TABLES = (
    Table(
        1,
        "CIFAR-100, teacher and student of one family",
        tuple(PAIRS)[:6],
        _rows("""
            teacher       | teacher           | 72.34 79.42 75.61 75.61 74.64 74.31
            student alone | cross_entropy     | 69.06 72.50 73.26 71.98 70.36 71.14
            FitNets       | fitnets           | 69.21 73.50 73.58 72.24 71.02 71.06
            AT            | at                | 70.55 73.44 74.08 72.77 71.43 72.31
            VID           | vid               | 70.38 73.09 74.11 73.30 71.23 72.61
            CRD           | crd               | 71.16 75.51 75.48 74.14 73.94 73.48
            CAT-KD        | cat_kd            | 71.05 76.91 75.60 74.82 74.65 73.62
            ReviewKD      | reviewkd          | 71.89 75.63 76.12 75.09 74.84 73.89
            NORM          | norm-kd_weight=1  | 71.61 76.98 76.26 75.42 74.46 73.95
            FCFD          | fcfd              | 71.96 76.62 76.43 75.46 75.22 -
            KD            | kd                | 70.66 73.33 74.92 73.54 72.98 73.08
            TAKD          | takd              | 70.83 73.81 75.12 73.78 73.23 73.37
            CTKD          | ctkd              | 71.19 73.79 75.45 73.93 73.52 73.52
            NKD           | nkd               | 70.40 76.35 75.24 74.07 74.86 72.77
            DKD           | dkd               | 71.97 76.32 76.24 74.81 74.68 74.11
            LSKD          | lskd              | 71.43 76.62 76.11 74.37 74.36 74.17
            TTM           | ttm               | 71.83 76.17 76.23 74.32 74.33 73.97
            MLKD          | mlkd              | 72.19 77.08 76.63 75.35 75.18 74.11
            CRLD          | crld              | 72.10 77.60 76.45 75.58 75.27 74.42
            CALD          |                   | 72.05 77.02 76.44 75.12 74.99 74.19
            ranking alignment | ranking_alignment | 72.39 77.97 77.13 75.98 75.84 75.29
        """),
    ),
    Table(
        2,
        "CIFAR-100, teacher and student of different families",
        tuple(PAIRS)[6:11],
        _rows("""
            teacher       | teacher           | 79.42 74.64 79.34 75.61 79.42
            student alone | cross_entropy     | 71.82 64.60 64.60 70.50 70.50
            FitNets       | fitnets           | 73.54 64.16 63.16 73.73 73.59
            AT            | at                | 72.73 59.40 58.58 73.32 71.73
            VID           | vid               | 73.40 65.56 67.57 73.61 73.38
            CRD           | crd               | 75.65 69.63 69.11 76.05 75.11
            CAT-KD        | cat_kd            | 78.41 69.13 71.36 77.35 78.26
            ReviewKD      | reviewkd          | 77.78 70.37 69.89 77.14 77.45
            NORM          | norm-kd_weight=1  | 78.32 69.38 71.17 77.63 77.79
            FCFD          | fcfd              | 78.18 70.65 71.00 77.99 78.12
            KD            | kd                | 74.45 67.37 67.35 74.83 74.07
            TAKD          | takd              | 74.82 67.91 68.02 75.34 74.53
            CTKD          | ctkd              | 75.31 68.46 68.47 75.78 74.48
            NKD           | nkd               | 76.26 70.22 70.67 75.96 75.31
            DKD           | dkd               | 77.07 69.71 70.35 76.70 76.45
            LSKD          | lskd              | 75.56 68.61 69.02 76.62 75.62
            TTM           | ttm               | 76.55 69.16 69.59 75.42 74.37
            MLKD          | mlkd              | 78.44 70.57 71.04 77.44 77.18
            CRLD          | crld              | 78.27 70.39 71.36 -     -
            CALD          |                   | 77.89 70.42 71.19 77.25 77.63
            ranking alignment | ranking_alignment | 79.44 71.03 72.31 78.36 78.57
        """),
    ),
    Table(
        3,
        "Tiny-ImageNet",
        tuple(PAIRS)[11:],
        _rows("""
            teacher       | teacher           | 62.99 62.99
            student alone | cross_entropy     | 56.28 60.78
            AT            | at                | 57.18 62.45
            CRD           | crd               | 61.18 63.97
            KD            | kd                | 58.35 62.26
            DKD           | dkd               | 62.04 65.06
            KD + DOT      | dot               | 64.01 65.75
            LSKD          | lskd              | 64.20 65.97
            ranking alignment | ranking_alignment | 64.30 66.58
        """),
    ),
    Table(
        4,
        "the loss, CIFAR-100",
        ("cifar100_res32x4_res8x4",),
        _rows("""
            CE                | cross_entropy                    | 72.50
            CE + KD           | kd                               | 73.33
            CE + RA(L1)       | ranking_alignment-kind=l1        | 77.12
            CE + RA(Spearman) | ranking_alignment-kind=spearman  | 77.44
            CE + RA(L2)       | ranking_alignment                | 77.97
            CE + KD + RA(L2)  | ranking_alignment-kd_weight=0.9  | 77.29
        """),
    ),
    Table(
        5,
        "lambda, CIFAR-100",
        ("cifar100_res32x4_res8x4",),
        _rows("""
            0.1 | ranking_alignment-lam=0.1 | 75.59
            0.5 | ranking_alignment-lam=0.5 | 76.74
            1   | ranking_alignment-lam=1   | 77.17
            5   | ranking_alignment         | 77.97
            10  | ranking_alignment-lam=10  | 77.71
        """),
    ),
    Table(
        5,
        "lambda, Tiny-ImageNet",
        ("tinyimagenet_res18_mv2",),
        _rows("""
            0.5 | ranking_alignment-lam=0.5 | 62.15
            1   | ranking_alignment-lam=1   | 63.16
            5   | ranking_alignment-lam=5   | 64.02
            10  | ranking_alignment         | 64.30
            15  | ranking_alignment-lam=15  | 64.03
        """),
    ),
)
