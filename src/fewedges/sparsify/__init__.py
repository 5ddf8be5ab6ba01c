"""Make it sparse. Calling the package runs its verb: fewedges.sparsify.stages.sparsify."""

from fewedges._verb import make_callable_

make_callable_(__name__, "stages", "sparsify")
