"""What the tests of dashboards and deployment share."""

# A fixture is found by the name it has here.
from tests.stream.conftest import small_bundle

__all__ = ["small_bundle"]
