"""Which parts do the task. Calling the package runs its verb: fewedges.explain.explaining.explain."""

from fewedges._verb import make_callable_

make_callable_(__name__, "explaining", "explain")
