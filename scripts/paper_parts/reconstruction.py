"""(d) A = c I + sum_k U_k V_k^T and A = F_K ... F_1, K = ceil(rank(A - c I) / r), for every kind of A."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dlor_peft.maths import materialise
from dlor_peft.reconstruct import factorise_product, factorise_sum

from . import figures


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def orthogonal(n: int, sign: int) -> Tensor:
    """An orthogonal matrix of determinant `sign`."""
    Q = torch.linalg.qr(normal(n, n))[0]
    Q[:, 0] *= sign * torch.linalg.det(Q).sign()
    return Q


def jordan(n: int, eigenvalue: float) -> Tensor:
    return eigenvalue * eye(n) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)


# the matrix of each even n, and the rank of A - I as theory has it, almost surely where A is random
MATRICES: dict[str, tuple[Callable[[int], Tensor], Callable[[int], int]]] = {
    "Gaussian": (lambda n: normal(n, n) / n**0.5, lambda n: n),
    "orthogonal, det -1": (lambda n: orthogonal(n, -1), lambda n: n - 1),
    "orthogonal, det 1": (lambda n: orthogonal(n, 1), lambda n: n),
    "cyclic permutation": (lambda n: eye(n).roll(1, 0), lambda n: n - 1),
    "reflection": (lambda n: eye(n) - 2 * eye(n)[:, :1] @ eye(n)[:1], lambda n: 1),
    "Jordan, eigenvalue 1": (lambda n: jordan(n, 1), lambda n: n - 1),
    "Jordan, eigenvalue 0": (lambda n: jordan(n, 0), lambda n: n),
    "singular, rank n/2": (lambda n: normal(n, n // 2) @ normal(n // 2, n) / n, lambda n: n),
    "I + rank 4": (lambda n: eye(n) + normal(n, 4) @ normal(4, n) / n, lambda n: 4),
}


def product(d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """F_K ... F_1, dense, factor by factor."""
    A = eye(U.shape[1])
    for factor in zip(d, U, V, strict=True):
        A = materialise(*factor) @ A
    return A


def run(quick: bool) -> dict[str, Any]:
    sizes, ranks = ([8, 16], [1, 3]) if quick else ([8, 16, 32, 64, 128, 256], [1, 2, 4, 16])
    results: dict[str, Any] = {}
    for name, (make, rank_of) in MATRICES.items():
        rows = []
        for n in sizes:
            torch.manual_seed(n)
            A = make(n)
            for r in ranks:
                c, U, V = factorise_sum(A, r)
                total = c * eye(n) + torch.einsum("kir,kjr->ij", U, V)
                d, U_product, V_product = factorise_product(A, r)
                rows.append(
                    {
                        "n": n,
                        "r": r,
                        "bound": max(1, math.ceil(rank_of(n) / r)),
                        "sum_terms": len(U),
                        "product_factors": len(U_product),
                        "sum_error": ((total - A).norm() / A.norm()).item(),
                        "product_error": ((product(d, U_product, V_product) - A).norm() / A.norm()).item(),
                        "sum_parameters": 1 + U.numel() + V.numel(),
                        "product_parameters": len(U_product) + U_product.numel() + V_product.numel(),
                    }
                )
        results[name] = rows
    return results


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, middle, right) = figures.panels(3)
    every = [row for rows in numbers.values() for row in rows]
    bounds = sorted({row["bound"] for row in every})
    left.plot(bounds, bounds, color="black", linewidth=0.8, label="ceil(rank(A - I) / r)")
    for key, marker, label in (
        ("sum_terms", "o", "terms of the sum"),
        ("product_factors", "x", "factors of the product"),
    ):
        left.scatter([row["bound"] for row in every], [row[key] for row in every], marker=marker, label=label)
    figures.finish(left, "bound", "number found", "every A, n and r", log="xy")
    for axis, key in ((middle, "sum_error"), (right, "product_error")):
        for name, rows in numbers.items():
            sizes = sorted({row["n"] for row in rows})
            worst = [max(row[key] for row in rows if row["n"] == n) for n in sizes]
            axis.plot(sizes, [max(error, 1e-18) for error in worst], marker="o", label=name)
        title = f"{'sum' if key == 'sum_error' else 'product'}, worst r"
        figures.finish(axis, "n", "relative error (Frobenius)", title, log="xy", legend=axis is middle)
        axis.set_ylim(1e-18, 1e-10)
    return figure


def caption(numbers: dict[str, Any]) -> str:
    every = [row for rows in numbers.values() for row in rows]
    exact = [row for row in every if row["bound"] == row["sum_terms"] == row["product_factors"]]
    errors = {key: max(row[key] for row in every) for key in ("sum_error", "product_error")}
    worst = max(numbers, key=lambda name: max(row["product_error"] for row in numbers[name]))
    ranks = ", ".join(map(str, sorted({row["r"] for row in every})))
    agrees = len(exact) == len(every) and max(errors.values()) < 1e-10
    return (
        "**Claim.** Every full-rank map is exactly a sum (width) or a product (depth) of ceil(rank(A - c I) / r) "
        "terms alpha I + U V^T of rank r.\n\n"
        f"**Measured.** {len(numbers)} kinds of matrices, c = 1, n up to {max(row['n'] for row in every)}, r of "
        f"{ranks}, float64: {len(exact)} of {len(every)} cases have exactly the number of terms of the bound, both "
        f"ways. Largest relative error: sum {errors['sum_error']:.0e}, product {errors['product_error']:.0e} "
        f"({worst}). Full rank is not needed: singular and defective matrices are no exception. "
        f"{figures.verdict(agrees)}\n\n"
        "That depth is cheaper than width does not show here: for a linear map the two have the same number of "
        "terms, and the product has one alpha more for each. A gain needs activations between the factors: (f)."
    )
