"""The assertions of `reading` tell values, as the tests' own do."""

import pytest

pytest.register_assert_rewrite("tests.inputs.reading")
