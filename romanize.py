"""Devanagari as people type it on a Latin keyboard: मुझे समझ नहीं आ रहा → mujhe samajh nahi aa raha.

    python -c "import romanize; print(romanize.romanize('मैं कल बाज़ार गया था'))"

indic-transliteration gives one letter a sound (SLP1); the rules below make it what people write: unspoken a's go, no
diacritics, no case. Real spelling is not consistent, so the commonest words have several and a seed chooses.
"""

import functools
import random
import re
import unicodedata

from indic_transliteration import sanscript

# What rules get wrong, as it is commonly typed; the first spelling is the usual one.
COMMON = {
    "मैं": "mai main", "में": "me mein", "नहीं": "nahi nahin", "वह": "woh wo", "वो": "wo woh", "यह": "yeh ye",
    "वे": "ve", "हूँ": "hu hoon", "हूं": "hu hoon", "हाँ": "haan han", "हां": "haan han", "हैं": "hain hai",
    "क्यों": "kyun kyon", "गई": "gayi gai", "गयी": "gayi", "गए": "gaye", "गये": "gaye", "नई": "nayi", "नए": "naye",
    "कई": "kai", "लिए": "liye", "दिए": "diye", "किए": "kiye", "चाहिए": "chahiye", "हुए": "hue",
    "बहुत": "bahut bohot", "अच्छा": "achha accha", "अच्छी": "achhi acchi", "अच्छे": "achhe acche",
    "ज़्यादा": "zyada", "ज्यादा": "zyada jyada", "पर": "par pe", "बहन": "behen", "शहर": "shehar shahar",
    "कुछ": "kuch kuchh", "वक़्त": "waqt", "वक्त": "waqt vakt", "मेरा": "mera", "गाँव": "gaon", "गांव": "gaon",
    "पाँव": "paon", "पांव": "paon", "फिर": "phir fir", "फूल": "phool", "फल": "phal", "वाला": "wala",
    "वाली": "wali", "वाले": "wale", "वालों": "walon", "वाह": "wah", "वापस": "wapas", "वहाँ": "wahan waha",
    "वहां": "wahan waha", "यहाँ": "yahan yaha", "यहां": "yahan yaha", "कहाँ": "kahan kaha", "कहां": "kahan kaha",
    "जहाँ": "jahan", "जहां": "jahan", "माँ": "maa", "मां": "maa", "न": "na", "हिंदी": "hindi", "डॉक्टर": "doctor",
    "ऑफिस": "office", "ऑफ़िस": "office", "फोन": "phone", "फ़ोन": "phone", "फिल्म": "film", "स्कूल": "school",
    "ट्रेन": "train", "मोबाइल": "mobile", "कंप्यूटर": "computer", "टाइम": "time", "पुलिस": "police", "ॐ": "om",
}  # fmt: skip
SOUNDS = {  # SLP1 → letters, where they differ
    "K": "kh", "G": "gh", "N": "n", "c": "ch", "C": "chh", "J": "jh", "Y": "n", "W": "th", "q": "d", "Q": "dh",
    "R": "n", "T": "th", "D": "dh", "P": "f", "B": "bh", "S": "sh", "z": "sh", "L": "l", "f": "ri", "F": "ri",
    "x": "lri", "A": "a", "I": "i", "U": "u", "E": "ai", "O": "au", "M": "n", "~": "n", "H": "h", "X": "q",
    "Z": "z"}  # fmt: skip
SIGNS = {0x0964: ".", 0x0965: ".", 0x0970: "."}  # danda and its kin
SIGNS |= {0x0966 + digit: str(digit) for digit in range(10)}
CONSONANT = "[kKgGNcCjJYwWqQRtTdDnpPbBmyrlvSzshLZX]"  # X, Z: क़ and ज़, which SLP1 writes k0 and j0
VOWEL = "[aAiIuUfFxeEoO]"


@functools.lru_cache(1 << 17)
def spell(word):
    """One Devanagari word by the rules."""
    word = re.sub("[\u200c\u200d\u0951-\u0954ऽ]", "", word)
    word = word.translate(str.maketrans("ॉऑॅऍॊऒ", "ोओेएोओ"))  # candra o and e
    s = sanscript.transliterate(word, sanscript.DEVANAGARI, sanscript.SLP1)
    for letter, sound in (("k0", "X"), ("j0", "Z"), ("0", "")):  # ख़ ग़ फ़ ड़ ढ़ are typed like ख ग फ ड ढ
        s = s.replace(letter, sound)
    # Unspoken a. At the end, unless the word has no other vowel or would end in -iy or a cluster like tr, ky, shn.
    if re.search(f"{VOWEL}.*{CONSONANT}a$", s):
        if not re.search(f"([iIe]y|{CONSONANT}[yr]|[^r{VOWEL[1:-1]}M]v|[sSzgtTp]n|zR)a$", s):
            s = s[:-1]
    # Inside, between vowel + consonant and consonant + vowel, from the right: laqakA → laqkA (Ohala's rule).
    for i in range(len(s) - 3, 1, -1):
        if s[i] == "a" and re.fullmatch(f"{VOWEL}{CONSONANT}a{CONSONANT}{VOWEL}", s[i - 2 : i + 3]):
            s = s[:i] + s[i + 1 :]
    s = re.sub("ah(?=[^aAiIuUfeEoOmy~M])", "eh", s)  # pehla, kehna, rehta
    s = re.sub("(?<=[sSjd])v", "w", s.replace("w", "t"))  # swagat, dwara
    # Long vowels are doubled where they are heard most: a at the start, all in a last closed syllable.
    s = re.sub("^A(?![iIuUeEoO])", "aa", s)
    close = f"(?={CONSONANT}+$)"
    s = re.sub(f"A{close}", "aa", re.sub(f"I{close}", "ee", re.sub(f"U{close}|U(?=[M~]$)", "oo", s)))
    s = s.replace("jY", "gy")
    s = re.sub("H(?!$)", "", re.sub("[M~](?=[pPbBm])", "m", s))
    s = "".join(SOUNDS.get(c, c) for c in s).replace("chch", "cch").replace("cchh", "chh")
    return re.sub("[^a-z0-9]", "", s.lower())


def romanize(text, seed=None):
    """`text` with its Devanagari romanised, all else as it is. Without a seed the usual spelling of each word."""
    rng = random.Random(seed)

    def word(match):
        spellings = COMMON.get(match[0])
        if not spellings:
            return spell(match[0])
        return rng.choice(spellings.split()) if seed is not None else spellings.split()[0]

    text = unicodedata.normalize("NFC", text).translate(SIGNS)
    return re.sub("[\u0900-\u0963\u0966-\u097f\u200c\u200d]{1,64}", word, text)
