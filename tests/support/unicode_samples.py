"""Characters of every plane, and sequences that are one sign to the eye. Knows no tokenizer."""

PLANES = range(17)
SURROGATES = range(0xD800, 0xE000)
EDGES = (
    0x00,
    0x7F,
    0x80,
    0x7FF,
    0x800,
    0xD7FF,
    0xE000,
    0xFFFD,
    0xFFFF,
    0x10000,
    0x1FFFF,
    0xFFFFF,
    0x100000,
    0x10FFFF,
)
"""Where UTF-8 grows by a byte, around the surrogates, and the last there is."""  # fmt: skip

SEQUENCES = [
    "e\u0301 a\u0328\u0301 \u1100\u1161\u11a8",  # marks on letters, a syllable of three
    "👩‍👩‍👧‍👦👩🏽‍🚀🏴‍☠️",  # joined by ZWJ, with a colour of skin, with a variation selector
    "🇩🇪🇯🇵1️⃣",  # flags are two letters, a keycap is three characters
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag spelled in tags of plane 14
    "नमस्ते क्षि ตัวอย่าง",
    "葛󠄀葛󠄁 𠮷野家 𝔘𝔫𝔦",  # variation selectors of plane 14, planes 2 and 1
    "שָׁלוֹם \u202eabc\u202c العَرَبِيَّة",
]


def sampled(plane: int, step: int) -> str:
    """One in `step` of a plane's characters, and those of EDGES that lie in it."""
    codes = {*range(plane << 16, (plane + 1) << 16, step), *(edge for edge in EDGES if edge >> 16 == plane)}
    return "".join(chr(code) for code in sorted(codes) if code not in SURROGATES)
