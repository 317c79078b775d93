"""The GIF: a picture a step, letters joined, the right colours in the right places."""

import pytest

import gif

Image = pytest.importorskip("PIL.Image")
ImageFont = pytest.importorskip("PIL.ImageFont")
features = pytest.importorskip("PIL.features")


def able():
    try:
        return features.check("raqm") and gif.find_font()
    except ValueError:
        return False


drawable = pytest.mark.skipif(not able(), reason="no libraqm, or no Devanagari font")
KSHI = ["क्षि", "new", 0.9, [0]]
STEPS = [[["राम ", "prompt", None, [0]], ["", "open", None, [1]]], [["राम ", "prompt", None, [0]], KSHI]]


def trace(steps):
    return dict(steps=[dict(units=units) for units in steps])


@drawable
def test_a_picture_a_step_and_a_rest_at_the_end(tmp_path, monkeypatch):
    draw, fonts = gif.frame, []
    monkeypatch.setattr(gif, "frame", lambda units, font, height: (fonts.append(font), draw(units, font, height))[1])
    gif.save(trace(STEPS), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 2 and image.size[0] == gif.WIDTH
        durations = []
        for n in range(2):
            image.seek(n)
            durations.append(image.info["duration"])
        assert durations == [700, 3000]
    assert all(font.layout_engine == ImageFont.Layout.RAQM for font in fonts) and len(fonts) == 2


@drawable
def test_of_a_long_run_every_third_step_and_the_last(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gif, "FRAMES", 4)
    monkeypatch.setattr(gif, "frame", lambda units, font, height: drawn.append(units) or Image.new("RGB", (9, 9)))
    gif.save(trace(steps := [[[str(i), "kept", 0.5, [0]]] for i in range(10)]), tmp_path / "a.gif")
    assert drawn == [steps[i] for i in (0, 3, 6, 9)]


@drawable
def test_conjuncts_are_joined_and_backgrounds_lie_behind_them():
    font = ImageFont.truetype(gif.find_font(), gif.SIZE, layout_engine=ImageFont.Layout.RAQM)
    plain = ImageFont.truetype(gif.find_font(), gif.SIZE, layout_engine=ImageFont.Layout.BASIC)
    assert font.getlength("क्षि") < 0.8 * plain.getlength("क्षि"), "the letters are not joined"
    picture = gif.frame([KSHI], font, 100)
    width, y = font.getlength("क्षि"), gif.EDGE - 1
    assert picture.getpixel((gif.EDGE + 1, y)) == gif.shade(0.9)
    assert picture.getpixel((gif.EDGE + int(width) + 3, y)) == (255, 255, 255)
    hole = gif.frame([["", "open", None, [0]]], font, 100)
    assert hole.getpixel((gif.EDGE + gif.SIZE // 2, gif.EDGE + gif.SIZE // 2)) == (0xE6, 0xE1, 0xD8)


@drawable
def test_a_font_with_latin_letters_is_taken_where_there_is_one():
    from matplotlib import font_manager

    found = font_manager.get_font(gif.find_font()).get_charmap()
    assert ord("क") in found
    lohit = [f for f in font_manager.findSystemFonts() if "Lohit-Devanagari" in f]
    assert not lohit or ord("a") in found


def test_lines_break_at_spaces_and_keep_all_units():
    units = [[c, "kept", 0.5, [i]] for i, c in enumerate("aaa bbb\ncc dddddd")]
    found = gif.lines(units, 50, lambda text: 10 * len(text))
    assert ["".join(u[0] for u in line) for line in found] == ["aaa ", "bbb", "cc ", "ddddd", "d"]


def test_shades_rise_from_orange_to_blue():
    assert (gif.shade(0), gif.shade(0.5), gif.shade(1)) == (gif.LOW, gif.MID, gif.HIGH)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match="libraqm"):
        gif.save(trace(STEPS), tmp_path / "a.gif")
    monkeypatch.setattr(gif, "FAMILIES", ("No Such Font",))
    with pytest.raises(ValueError, match="fonts-lohit-deva"):
        gif.find_font()
    assert not list(tmp_path.iterdir())
