"""Small, real data sets that ship with jaxloop.

    (x_train, y_train), (x_test, y_test) = digits()

Invariant: a data set is a file of the package, so nothing is downloaded.
"""

from jaxloop.datasets.digits import digits

__all__ = ["digits"]
