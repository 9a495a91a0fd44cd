"""Small, real data sets that jaxloop ships.

(x_train, y_train), (x_test, y_test) = digits()
"""

from jaxloop.datasets.digits import digits

__all__ = ["digits"]
