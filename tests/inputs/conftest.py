"""Makes the assertions of `reading` show values, as the tests' own do."""

import pytest

pytest.register_assert_rewrite("tests.inputs.reading")
