import pytest
from tests.laws.format_laws import FormatLaws

from parco import formats
from parco.formats import Table


class TestFormats(FormatLaws):
    @pytest.fixture(params=formats.NAMES)
    def format(self, request):
        return formats.parse(request.param)


def test_a_table_holds_its_ends_in_order():
    tables = [format.element for name in formats.NAMES if isinstance((format := formats.parse(name)).element, Table)]
    assert tables
    for table in tables:
        assert (table.entries[0], table.entries[-1]) == (-1, 1)
        assert list(table.entries) == sorted(table.entries)
