"""`pytest -m parity` runs tests/parity, and so for every folder."""


def test_every_test_is_marked_with_its_folder(request):
    assert all(item.get_closest_marker(item.path.parent.name) for item in request.session.items)
