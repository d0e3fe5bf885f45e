"""The rows of a matrix summed by the centroid that each of them names."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mgvq.compiled import njit, prange

_ROWS, _COLUMNS = 256, 64  # of the matrix at a time: an eighth of a megabyte, which a core's cache holds for all vectors


def rows_by_centroid(
    matrix: Float[Tensor, "out columns"], codes: Int[Tensor, "out v"], num_centroids: int
) -> Float[Tensor, "v k columns"]:
    """Of each vector: the sum of the rows r whose code is c, for every c, in float64.

    Rows are added in their order, so that the number of threads does not matter. `out * columns` additions a vector, where a
    product with a matrix of zeros and ones takes k times as many and the room of that matrix; on a GPU it is that product.
    """
    if matrix.device.type != "cpu":
        named = matrix.new_zeros(codes.shape[1], num_centroids, len(codes), dtype=torch.float64)
        named.scatter_(1, codes.T.unsqueeze(1), 1.0)
        return named @ matrix.double()
    sums = torch.zeros(codes.shape[1], num_centroids, matrix.shape[1], dtype=torch.float64)
    _add(matrix.double().contiguous().numpy(), codes.T.contiguous().numpy(), sums.numpy())
    return sums


@njit(parallel=True)
def _add(matrix, codes, sums):  # type: ignore[no-untyped-def]
    num_vectors, num_rows = codes.shape
    for tile in prange((matrix.shape[1] + _COLUMNS - 1) // _COLUMNS):
        columns = slice(tile * _COLUMNS, min((tile + 1) * _COLUMNS, matrix.shape[1]))
        found = np.zeros((num_vectors, sums.shape[1], columns.stop - columns.start))
        for first in range(0, num_rows, _ROWS):
            part = matrix[first : first + _ROWS, columns].copy()
            for vector in range(num_vectors):
                for row in range(len(part)):
                    into, some = found[vector, codes[vector, first + row]], part[row]
                    for column in range(len(some)):
                        into[column] += some[column]
        sums[:, :, columns] = found
