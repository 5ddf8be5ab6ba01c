"""Make it sparse. Calling the package runs its verb: fewedges.sparsify.attention.result.sparsify."""

from fewedges._verb import make_callable_

make_callable_(__name__, "attention.result", "sparsify")
