import pytest

from stillframe.settings import Settings, make_settings, read_toml


def test_a_file_gives_the_settings_back(tmp_path):
    settings = Settings(frames=tmp_path / "a.zarr", out=tmp_path / "run", max_shift=9, fill=-1.5, memory=2.0)
    file = tmp_path / "settings.toml"
    file.write_text(settings.to_toml())
    assert make_settings(read_toml(file)) == settings


def test_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Settings(frames="a.zarr", out="run").frames == tmp_path / "a.zarr"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"out": "run"}, "frames: field required"),
        ({"frames": "a", "out": "b", "max_shift": -1}, "max_shift = -1: input should be greater"),
        ({"frames": "a", "out": "b", "max_shift": "far"}, "max_shift = 'far'"),
        ({"frames": "a", "out": "b", "interpolation": "sinc"}, "interpolation = 'sinc': input should be 'nearest'"),
        ({"frames": "a", "out": "b", "maxshift": 3}, "maxshift = 3: extra inputs are not permitted"),
        ({"frames": "a", "out": "b", "version": 2}, "version = 2"),
        ({"frames": "a", "out": "b", "overlap_ratio": float("nan")}, "overlap_ratio = nan"),
    ],
)
def test_mistakes_are_named(values, words):
    with pytest.raises(ValueError, match="settings cannot be used") as caught:
        make_settings(values)
    assert words in str(caught.value)


def test_one_message_names_every_mistake():
    with pytest.raises(ValueError, match=r"(?s)max_shift.*overlap_ratio"):
        make_settings({"frames": "a", "out": "b", "max_shift": -1, "overlap_ratio": 3})


@pytest.mark.parametrize("content", [b"max_shift = = 3", b"\xff\xfe", b"[a\n"])
def test_a_file_that_is_not_toml_raises(tmp_path, content):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.toml is not TOML"):
        read_toml(tmp_path / "x.toml")
