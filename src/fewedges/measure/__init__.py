"""What did it cost, what did it buy. Calling the package runs its verb: fewedges.measure.ledger.measure."""

from fewedges._verb import make_callable_

make_callable_(__name__, "ledger", "measure")
