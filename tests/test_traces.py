"""Traces: what is shown is what was decoded, open units are the masks, and no text can act in a page or a terminal."""

import json
import math
import os
import random
import stat
import unicodedata
from types import SimpleNamespace

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from traces import BLOCK, EVERY, OPEN, PLAYER, STATES, Trace, Watch, clusters, columns, html, plain, render, write

PIECES = ["स", "त्र", "ी", "क", "्ष", "ि", " ", " है", "ा", "में", "\n", "्", "हि", "न्दी", "\u200d", "\u200c", "a b", "😀"]


class FakeTokenizer:
    """0 and 1 are special, then the 256 bytes, then PIECES."""

    eos_id = 1
    table = [b"", b"", *(bytes([b]) for b in range(256)), *(p.encode() for p in PIECES)]
    vocab_size = len(table)

    def token_bytes(self, id):
        return self.table[id]

    def decode(self, ids):
        return b"".join(self.table[i] for i in ids).decode(errors="replace")


TOKENIZER = FakeTokenizer()
MASK = TOKENIZER.vocab_size
EOS = TOKENIZER.eos_id


def ids(*pieces):
    """Strings and raw bytes → ids; what is no piece goes by its bytes."""
    out = []
    for p in pieces:
        whole = isinstance(p, str) and p in PIECES
        out += [258 + PIECES.index(p)] if whole else [2 + b for b in (p.encode() if isinstance(p, str) else p)]
    return out


def split(tokens, age=None):
    return clusters(tokens, TOKENIZER, MASK, age or [0] * len(tokens))


def texts(tokens):
    return [BLOCK if latest is None else text for text, _, latest in split(tokens)]


def step(rows, confidence=None, revealed=None, forwards=1):
    T = len(rows[0])
    confidence = [[0.5] * T for _ in rows] if confidence is None else confidence
    revealed = [[False] * T for _ in rows] if revealed is None else revealed
    return SimpleNamespace(x=rows, confidence=confidence, revealed=revealed, forwards=forwards)


def unmasked(final, order, reopened=(), given_positions=(), **kwargs):
    """A trace that decides the positions of `order` one a step; those in `reopened` are opened once more and filled."""
    canvas = [t if i in given_positions else MASK for i, t in enumerate(final)]
    trace = Trace(TOKENIZER, MASK, canvas=canvas, **kwargs)
    now, todo, again = list(canvas), list(order), set(reopened)
    for n in range(1, 4 * len(final) + 2):
        if not todo:
            break
        i = todo.pop(0)
        back = [j for j in again if now[j] != MASK][:1]
        for j in back:
            now[j] = MASK
            again.discard(j)
            todo.append(j)
        now[i] = final[i]
        trace.add(step([list(now)], forwards=n))
    return trace


# ---------------------------------------------------------------------------------------------------------------------
# units


def test_the_row_is_split_into_clusters_not_into_tokens():
    tokens = ids("स", "्", "त्र", "ी", " ", "क", "्ष", "हि", "न्दी")  # स्त्री क्षहिन्दी in 9 tokens
    assert texts(tokens) == ["स्त्री", " ", "क्ष", "हि", "न्दी"]
    assert [where for _, where, _ in split(tokens)] == [[0, 1, 2, 3], [4], [5, 6], [7], [8]]


def test_a_conjunct_over_two_tokens_has_the_later_ones_state_and_confidence():
    tokens = ids("क", "्ष", " है")
    for first, second in ((0, 1), (1, 0)):
        trace = Trace(TOKENIZER, MASK, canvas=[MASK, MASK, tokens[2]])
        now = [MASK, MASK, tokens[2]]
        now[first] = tokens[first]
        trace.add(step([list(now)], confidence=[[0.25] * 3]))
        now[second] = tokens[second]
        trace.add(step([list(now)], confidence=[[0.75] * 3], forwards=2))
        assert trace.units[0] == ["क्ष", "new", 0.75, [0, 1]]
        trace.add(step([[*now[:2], MASK]], forwards=3))
        trace.add(step([list(now)], confidence=[[0.125] * 3], forwards=4))
        assert trace.units[0] == ["क्ष", "kept", 0.75, [0, 1]], "a later step changed the confidence of an old decision"
        assert [u[1] for u in trace.units] == ["kept", "new", "new"]  # " है" was given, reopened, decided again


def test_what_waits_for_an_open_neighbour_is_shown_with_it():
    ka = "क".encode()
    m = [MASK]
    assert texts(ids("स") + m + ids("ी", " है")) == ["स", BLOCK, " ", "है"]  # a matra without its base
    assert texts(m + ids("्ष")) == [BLOCK, "ष"]
    assert texts(m + ids("\u200d", "ा")) == [BLOCK]
    assert texts(ids("स", ka[:2]) + m) == ["स", BLOCK]  # a character that is not finished
    assert split(ids("स", ka[:2]) + m)[1] == ("", [1, 2, 3], None)
    assert texts(m + ids(ka[1:], "ा")) == [BLOCK]
    assert split(ids(ka[:1]) + m + ids(ka[2:]) + m) == [("", [0, 1, 2], None), ("", [3], None)]
    assert texts(ids(ka[:1]) + m + ids(ka[2:])) == [BLOCK]
    assert texts(ids(ka[:1], ka[1:2], ka[2:])) == ["क"]


def test_bytes_that_nothing_can_complete_are_replacement_characters():
    for data in (b"\xe0\xa4", b"\xa4", b"\xff", b"\xe0A", b"a\x80\x80b", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf0\x9f\x98"):
        assert "".join(texts(ids(data))) == data.decode(errors="replace")
    assert texts([MASK, *ids(b"\xff")]) == [BLOCK, "\ufffd"]  # 0xFF is in no character, complete or not
    assert texts([*ids(b"\xff"), MASK]) == ["\ufffd", BLOCK]


def test_special_tokens_are_units_without_text():
    tokens = [EOS, *ids("स"), EOS, EOS, *ids("क"), EOS]
    assert split(tokens) == [("", [0], 0), ("स", [1], 1), ("", [2], 2), ("", [3], 3), ("क", [4], 4), ("", [5], 5)]
    assert texts([MASK, EOS, MASK]) == [BLOCK, "", BLOCK]
    assert split([*ids("क"), EOS, *ids("ा")]) == [("का", [0, 1, 2], 2)]
    assert split([]) == [] and Trace(TOKENIZER, MASK).to_dict()["text"] == ""


any_row = st.lists(st.integers(0, MASK) | st.just(MASK) | st.integers(258, MASK - 1), max_size=40)


@settings(max_examples=300, deadline=None)
@example([196, 0, MASK], random.Random(0))  # half a character, a special token, an open position
@given(any_row, st.randoms(use_true_random=False))
def test_any_row_is_accounted_for(tokens, rng):
    age = [rng.randrange(9) for _ in tokens]
    units = split(tokens, age)
    masks = [i for i, t in enumerate(tokens) if t == MASK]
    assert [i for _, where, latest in units if latest is None for i in where if tokens[i] == MASK] == masks
    assert sum(latest is None for *_, latest in units) == len(masks)
    assert {i for _, where, _ in units for i in where} == set(range(len(tokens)))
    for text, where, latest in units:
        assert where == list(range(where[0], where[-1] + 1))
        assert latest is None or (latest in where and age[latest] == max(age[i] for i in where))
        assert latest is not None or text == ""
    if not masks:
        assert "".join(text for text, *_ in units) == TOKENIZER.decode(tokens)


CONSONANTS, SIGNS = "कखगचजटतदनपबमयरलवशषसह", ["", "", "", "ा", "ि", "ी", "ु", "ू", "े", "ै", "ो", "ौ", "ं", "ः", "ँ", "ीं"]
joined = st.lists(st.sampled_from(CONSONANTS), min_size=1, max_size=3).map("्".join)  # a conjunct such as स्त्र
word = st.lists(st.tuples(joined, st.sampled_from(SIGNS)).map("".join), min_size=1, max_size=4).map("".join)
sentence = st.lists(word, min_size=1, max_size=5).map(" ".join).map(lambda s: s.replace(" न", "\nन") + "।")


@settings(max_examples=60, deadline=None)
@given(sentence, st.integers(0, 2**32))
def test_hindi_never_shows_a_loose_mark_or_half_a_character(text, seed):
    rng = random.Random(seed)
    tokens, data = [], text.encode()  # cut anywhere: long pieces where there is one, else bytes
    while data:
        fits = [i for i, piece in enumerate(TOKENIZER.table) if piece and data.startswith(piece)]
        tokens.append(rng.choice(fits))
        data = data[len(TOKENIZER.table[tokens[-1]]) :]
    order = rng.sample(range(len(tokens)), len(tokens))
    for i in order[:8]:
        hidden = [MASK if rng.random() < 0.4 or j == i else t for j, t in enumerate(tokens)]
        for shown, *_ in split(hidden):
            assert "\ufffd" not in shown
            assert not shown or unicodedata.category(shown[0])[0] != "M", (shown, hidden)
    trace = unmasked(tokens, order)
    assert trace.to_dict()["text"] == text == "".join(u[0] for u in trace.units)
    # `regex` agrees with a splitter written by hand: consonant (virama consonant)* sign*
    assert [u[0] for u in trace.units] == regex.findall(r"[क-ह](?:्[क-ह])*[ािीुूेैोौंःँ]*|[\s।]", text)


# ---------------------------------------------------------------------------------------------------------------------
# traces


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, MASK - 1), min_size=1, max_size=16), st.randoms(use_true_random=False))
def test_a_trace_counts_what_happened(final, rng):
    T = len(final)
    prompt = set(rng.sample(range(T), rng.randrange(T)))
    order = [i for i in rng.sample(range(T), T) if i not in prompt]
    trace = unmasked(final, order, rng.sample(order, len(order) // 3), prompt).to_dict()
    assert set(trace) == {"format", "prompt", "meta", "length", "text", "steps"} and trace["length"] == T
    assert trace["text"] == TOKENIZER.decode(final) and trace["steps"][-1]["tokens"] == final
    is_open = set(range(T)) - prompt  # followed through the lists of positions alone
    for k, s in enumerate(trace["steps"]):
        if k:
            assert is_open >= set(s["revealed"]) and not is_open & set(s["remasked"])
            is_open = is_open - set(s["revealed"]) | set(s["remasked"])
        assert is_open == {i for i, t in enumerate(s["tokens"]) if t == MASK}
        assert sum(u[1] in OPEN for u in s["units"]) == len(is_open)
        assert sum(u[1] == "remasked" for u in s["units"]) == len(s["remasked"])
        assert all(u[1] in STATES for u in s["units"])
        assert (s["forwards"], len(s["confidence"])) == (k, T)
        shown_new = {i for u in s["units"] if u[1] == "new" for i in u[3]}
        hidden = {i for u in s["units"] if u[1] in OPEN for i in u[3]}
        assert set(s["revealed"]) <= shown_new | hidden
    assert [s["seconds"] for s in trace["steps"]] == sorted(s["seconds"] for s in trace["steps"])


def test_the_canvas_is_rebuilt_from_the_first_step():
    final = ids("स", "क", "में")
    told = Trace(TOKENIZER, MASK)
    told.add(step([[0] * 3, final], revealed=[[0] * 3, [False, True, False]]), row=1)
    assert [s["tokens"] for s in told.steps] == [[final[0], MASK, final[2]], final]
    assert [s["forwards"] for s in told.steps] == [0, 1]
    assert [u[1] for u in told.steps[0]["units"]] == ["prompt", "open", "prompt"]
    told.add(step([[0] * 3, final], forwards=2), row=1)
    assert len(told.steps) == 2, "a complete row took part in the rest of its batch"
    with pytest.raises(AssertionError, match="2 positions, the canvas has 3"):
        told.add(step([[0, 0]], forwards=3))


def test_what_has_not_changed_is_held_once():
    trace = unmasked([*ids("हि", " ", "में"), MASK, *ids("a b")], [0, 2, 4], given_positions=(1,))
    for before, after in zip(trace.steps[1:], trace.steps[2:], strict=False):
        same = [a is b for a, b in zip(before["units"], after["units"], strict=False)]
        assert sum(same) >= len(same) - 4 and trace.steps[-1]["units"][1] is trace.steps[0]["units"][1]


def test_what_an_earlier_trace_wrote_is_no_prompt_of_the_next():
    final = ids("हि", " ", "में", " है")
    first = Trace(TOKENIZER, MASK, canvas=[final[0], MASK, MASK, MASK])
    first.add(step([[*final[:2], MASK, MASK]], [[0, 0.25, 0, 0]]), top={1: [0.5, [[final[1], 0.25]]], 2: [9, []]})
    first.add(step([final], [[0, 0, 0.5, 0.75]], forwards=2), top={2: [1.5, [[7, 0.5]]], 3: [2.5, [[8, 0.75]]]})
    second = Trace(TOKENIZER, MASK, canvas=[*final[:3], MASK], earlier=first)
    third = Trace(TOKENIZER, MASK, canvas=[*final[:2], MASK, final[3]], earlier=first)
    assert second.given == third.given == {0}
    assert [u[1] for u in second.units] == ["prompt", "kept", "kept", "open"]
    assert second.sure == [None, 0.25, 0.5, None] and third.sure == [None, 0.25, None, 0.75]
    assert second.steps[0]["top"] == {"1": [0.5, [[final[1], 0.25]]], "2": [1.5, [[7, 0.5]]]}
    assert third.steps[0]["top"] == {"1": [0.5, [[final[1], 0.25]]], "3": [2.5, [[8, 0.75]]]}
    assert second.pieces.keys() == {str(final[1]), "7"}


def test_tensors_and_numbers_that_json_has_not():
    torch = pytest.importorskip("torch")
    trace = Trace(TOKENIZER, MASK, prompt="क\udcff", meta={"steps": 1})
    confidence = torch.tensor([[float("nan"), float("inf"), 1 / 3]])
    trace.add(step(torch.tensor([ids("स", "ी", "क")]), confidence, torch.tensor([[True, True, False]])))
    assert json.loads(json.dumps(trace.to_dict(), allow_nan=False)) == trace.to_dict()
    assert trace.steps[1]["confidence"] == [0.0, 0.0, 0.3333] and trace.to_dict()["prompt"] == "क?"


def test_the_real_sampler_and_tokenizer():
    sampling, tokenizer = pytest.importorskip("sampling"), pytest.importorskip("tokenizer")
    torch = pytest.importorskip("torch")
    tok = tokenizer.Bytes()
    text = "स्त्री और क्षमा।"
    target = torch.tensor([tok.encode(text)])

    def oracle(x, where=None, lengths=None):  # knows the answer, and is surer of later positions
        return 5 * torch.nn.functional.one_hot(target.flatten()[where], tok.vocab_size).float() + where[:, None] * 0.01

    oracle.mask_id = tok.vocab_size
    x = target.clone()
    x[0, 6:] = oracle.mask_id
    trace = Trace(tok, oracle.mask_id)
    for s in sampling.denoise(oracle, x, steps=7, temperature=0.0):
        trace.add(s)
    assert len(trace.steps) == 8 and trace.to_dict()["text"] == text
    assert trace.steps[0]["tokens"] == x[0].tolist()
    assert plain(trace.steps[0]["units"]) == "स्" + BLOCK * int((x == oracle.mask_id).sum())


def test_what_the_model_thought_is_kept_for_each_position():
    torch = pytest.importorskip("torch")
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
    watch = Watch(k=3)
    assert watch.of(0) == {}
    watch(probs, torch.tensor([0, 1, 1]), torch.tensor([2, 0, 3]))
    entropy, likeliest = watch.of(0)[2]
    assert entropy == pytest.approx(1.5 * math.log(2), abs=1e-3) and likeliest == [[0, 0.5], [1, 0.25], [2, 0.25]]
    assert list(watch.of(1)) == [0, 3] and watch.of(1)[3] == [0.0, [[0, 1.0]]]  # what cannot be is left out
    assert [i for i, _ in watch.of(1)[0][1]] == [3, 2, 1]

    final = ids("स", "क", "में")
    trace = Trace(TOKENIZER, MASK, canvas=[MASK] * 3)
    top = {i: [1.0, [[final[0], 0.6], [final[1], 0.3]]] for i in range(3)}
    trace.add(step([[final[0], MASK, MASK]]), top=top)
    data = json.loads(json.dumps(trace.to_dict()))
    assert data == trace.to_dict() and data["steps"][1]["top"].keys() == {"0", "1", "2"}
    assert data["pieces"] == {str(final[0]): "स", str(final[1]): "क"}
    long = Trace(TOKENIZER, MASK, canvas=[MASK] * (EVERY + 1))
    long.add(step([[final[0]] + [MASK] * EVERY]), top={i: top[0] for i in range(EVERY + 1)})
    assert long.steps[1]["top"].keys() == {"0"}  # a long text keeps only what was thought of the decided


# ---------------------------------------------------------------------------------------------------------------------
# pages, files, terminals

NASTY = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&lt;\u2028\u2029\u202e\u2066\0\x1b[31m\r\t`"


def test_the_page_holds_the_trace_exactly_and_no_text_acts_in_it():
    trace = unmasked(ids(NASTY), range(3), given_positions=range(3, 999), prompt=NASTY, meta={"model": NASTY}).to_dict()
    page, player = html(trace), PLAYER.read_text(encoding="utf-8")
    start = page.index('id="trace">') + len('id="trace">')
    embedded = page[start : page.index("</script>", start)]
    assert json.loads(embedded) == trace and trace["text"] == NASTY
    assert embedded.isascii() and embedded.isprintable() and not set(embedded) & set("<>&")
    assert page[:start] + "null" + page[start + len(embedded) :] == player  # nothing else of the page changed


def test_the_player_needs_nothing_and_writes_text_only():
    player = PLAYER.read_text(encoding="utf-8")
    assert not regex.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp", player)
    assert not regex.search(r"""(src|href)\s*=|@import|url\(""", player)
    assert regex.findall(r"https?://[^\"]*", player) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in player and "light-dark(" in player and 'lang="hi"' in player


def test_files_are_written_whole_or_not_at_all(tmp_path):
    trace = unmasked(ids("क", "्ष"), [1, 0], meta={"seed": 1})
    trace.save(tmp_path / "new" / "t.json")
    assert json.loads((tmp_path / "new" / "t.json").read_text(encoding="utf-8")) == trace.to_dict()
    trace.save_html(tmp_path / "t.html")
    assert (tmp_path / "t.html").read_text(encoding="utf-8") == html(trace.to_dict())
    (tmp_path / "link").symlink_to("t.html")
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "link", "half\ud800")
    assert (tmp_path / "t.html").read_text(encoding="utf-8") == html(trace.to_dict())
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "t.html").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "new", "t.html"], "a temporary file stayed"
    with pytest.raises(IsADirectoryError):
        trace.save(tmp_path)
    before = os.stat(os.devnull)
    trace.save(os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode) and os.stat(os.devnull).st_ino == before.st_ino


def test_the_terminal_lines():
    units = [["एक", "prompt", None, [0]], [" ", "prompt", None, [0]], ["क्ष", "new", 0.5, [1]], ["", "open", None, [2]],
             ["\n", "kept", 0.9, [3]], ["", "kept", 0.9, [4]], ["", "remasked", None, [5]]]  # fmt: skip
    assert render(units, 20, color=False) == ["एक क्ष░", "░"]
    assert render(units, 20) == ["\x1b[1mएक \x1b[0m\x1b[48;5;24mक्ष\x1b[0m\x1b[2m░\x1b[0m", "\x1b[2;48;5;53m░\x1b[0m"]
    assert plain(units) == "एक क्ष░\n░"
    assert render([], 20) == [""]
    nasty = [[c, "kept", 0.5, [0]] for c in regex.findall(r"\X", NASTY)]
    assert all(c.isprintable() or regex.match(r"\p{Cf}", c) for line in render(nasty, 40, color=False) for c in line)
    assert not regex.search(r"[\x00-\x1f\x7f-\x9f\p{Bidi_Control}]", "".join(render(nasty, 40, color=False)))
    assert columns("क्षि") == 3 and columns("日本") == 4 and columns("हिन्दी") == 5


@settings(max_examples=100, deadline=None)
@given(st.text("कख ािa日\n", max_size=60), st.integers(2, 12))
def test_lines_fit_and_lose_only_spaces(text, width):
    units = [[c, "kept", 0.5, [0]] for c in regex.findall(r"\X", text)]
    lines = render(units, width, color=False)
    widest = max((columns(u[0]) for u in units), default=0)
    assert all(columns(line) <= max(width, widest) for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace("\n", "").replace(" ", "")
