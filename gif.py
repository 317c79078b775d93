"""A trace → an animated GIF, drawn as player.html shows it.

    python sample_diffusion.py --prompt "एक दिन" --gif appearing.gif

Pillow shapes Devanagari only with libraqm and a font that has it. Where either is missing, `save` says so: letters that
do not join would be no Hindi. A line is shaped as a whole and coloured behind, so that conjuncts and matras stay whole.
"""

from traces import OPEN, visible

FAMILIES = ("Noto Sans Devanagari", "Lohit Devanagari", "Nirmala UI", "Kohinoor Devanagari", "Mangal")
PAPER, INK, HOLE, NEW, MARK = "#ffffff", "#24211d", "#e6e1d8", "#1f5f99", "#b0306f"
LOW, MID, HIGH = (249, 176, 103), (248, 230, 189), (220, 235, 246)  # player.html's, of confidence 0, 1/2, 1
SIZE, WIDTH, EDGE = 26, 720, 24  # pixels
FRAMES = 60  # at most; of a longer run every second, third, ... step


def find_font():
    """The path of an installed Devanagari font, one with Latin letters too where there is one: romanised Hindi is text
    here. Raises ValueError if there is none."""
    from matplotlib import font_manager

    found = []
    for family in FAMILIES:
        try:
            wanted = font_manager.FontProperties(family=family)
            found.append(font_manager.findfont(wanted, fallback_to_default=False))
        except ValueError:
            continue
    if not found:
        raise ValueError("a GIF needs a Devanagari font; install one, such as Debian's fonts-lohit-deva")
    return max(found, key=lambda path: ord("a") in font_manager.get_font(path).get_charmap())  # the first of equals


def shade(confidence):
    """Of a background: (red, green, blue)."""
    end, far = (LOW if confidence < 0.5 else HIGH), 2 * abs(confidence - 0.5)
    return tuple(round(m + far * (e - m)) for e, m in zip(end, MID, strict=True))


def lines(units, width, length):
    """Units → lines of units, broken at spaces where there are any. length(text) in pixels."""
    out, line = [], []
    fits = lambda line: sum(size for _, size in pieces(line, length)) <= width  # noqa: E731
    for unit in units:
        if unit[1] not in OPEN and unit[0] in ("\n", "\r\n", "\u2028", "\u2029"):
            out.append(line)
            line = []
            continue
        line = [*line, unit]
        if not fits(line):
            cut = max((i + 1 for i, u in enumerate(line[:-1]) if u[0] == " "), default=len(line) - 1)
            out.append(line[:cut])
            line = line[cut:]
    return [*out, line]


def pieces(line, length):
    """[(run, pixels)]: runs of units that are drawn at once, a hole alone."""
    runs = []
    for unit in line:
        if runs and unit[1] not in OPEN and runs[-1][-1][1] not in OPEN:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    hole = 1.3 * SIZE
    return [(run, hole if run[0][1] in OPEN else length("".join(shown(u) for u in run))) for run in runs]


def shown(unit):
    return "".join(map(visible, unit[0]))


def frame(units, font, height):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen, y, leading = ImageDraw.Draw(image), EDGE, round(1.9 * SIZE)
    for line in lines(units, WIDTH - 2 * EDGE, font.getlength):
        x = EDGE
        for run, size in pieces(line, font.getlength):
            if run[0][1] in OPEN:
                again = dict(fill=PAPER, outline=MARK, width=2) if run[0][1] == "remasked" else dict(fill=HOLE)
                pen.rounded_rectangle((x + 3, y + 8, x + size - 3, y + SIZE), 5, **again)
            before = ""
            for unit in run:  # backgrounds first: what is before a unit, shaped with it, says where it begins
                start, before = font.getlength(before), before + shown(unit)
                box = (x + start, y - 2, x + font.getlength(before), y + SIZE + 8)
                if unit[1] not in OPEN and unit[2] is not None:
                    pen.rectangle(box, shade(unit[2]))
                if unit[1] == "new":
                    pen.rectangle((box[0], box[3], box[2], box[3] + 2), NEW)
            pen.text((x, y), before, INK, font)
            x += size
        y += leading
    return image


def save(trace, path):
    """trace: the dictionary of Trace.to_dict. Raises ValueError where this machine cannot shape or draw Devanagari."""
    from PIL import ImageFont, features

    if not features.check("raqm"):
        raise ValueError("a GIF needs Pillow with libraqm to join letters; install libfribidi (Debian: libfribidi0)")
    font = ImageFont.truetype(find_font(), SIZE, layout_engine=ImageFont.Layout.RAQM)
    steps = trace["steps"]
    steps = steps[:: -max(1, -(-len(steps) // FRAMES))][::-1]  # the last one always
    if not steps:
        raise ValueError("the trace has no step; there is nothing to draw")
    most = max(len(lines(step["units"], WIDTH - 2 * EDGE, font.getlength)) for step in steps)
    height = 2 * EDGE + round(1.9 * SIZE) * most
    images = [frame(step["units"], font, height).quantize(64) for step in steps]
    pace = min(700, max(70, 9000 // len(steps)))  # milliseconds, as the player's
    durations = [pace] * (len(images) - 1) + [3000]
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False
    )
