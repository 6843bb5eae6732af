"""The list of deliberate faults fits the code: each can be made, and the tests that must notice it exist."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.path)
def test_a_mutant_changes_one_place_of_a_file_and_names_a_test_file(mutant):
    assert (ROOT / mutant.path).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (ROOT / mutant.tests).exists()
