import pytest
from tests.laws.format_laws import FormatLaws

from parco import formats


class TestFormats(FormatLaws):
    @pytest.fixture(params=formats.NAMES)
    def format(self, request):
        return formats.parse(request.param)
