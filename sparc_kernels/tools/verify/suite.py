"""All checks of `sparc-kernels verify`, in the order of its table."""

from .checks import OPERATOR_CHECKS
from .routes import ROUTES

CHECKS = [*OPERATOR_CHECKS, *ROUTES]  # name, its word in Case.ops, function
