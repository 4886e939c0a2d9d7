"""A corpus of 2,000 strings in 20 scripts, made from words by a seeded generator."""
# ruff: noqa: RUF001 - the texts are in many alphabets

import random

WORDS = {
    "latin": "I'll it's WE'VE don't she'd you're I'M naïve façade Straße œuvre Łódź Việt Hello the",
    "cyrillic": "Привет мир съешь ещё этих мягких булок да выпей чаю Україна їжак Ђорђе нещо на Български",
    "greek": "Γειά σου Κόσμε η γρήγορη αλεπού ἐν ἀρχῇ ἦν ὁ λόγος Ωμέγα ΐ",
    "arabic": "مرحبا بالعالم السَّلَامُ عَلَيْكُمْ اللغة العربية کتاب ٣٤٥ ،؟ ـــ",
    "hebrew": "שלום עולם בְּרֵאשִׁית בָּרָא אֱלֹהִים ירושלים צה״ל",
    "devanagari": "नमस्ते दुनिया हिन्दी क्षेत्र विद्यार्थी श्री १२३ ॐ क़िला",
    "bengali": "নমস্কার পৃথিবী বাংলা ভাষা ক্ষমতা ১২৩ ড়",
    "tamil": "வணக்கம் உலகம் தமிழ் மொழி கொடு ௧௨",
    "thai": "สวัสดีชาวโลก ภาษาไทย น้ำ กำลัง ๑๒๓ ฯลฯ",
    "lao": "ສະບາຍດີ ໂລກ ພາສາລາວ ນ້ຳ ໑໒໓",
    "khmer": "សួស្តី ពិភពលោក កាន់តែពិសេសអាច ភាសាខ្មែរ ១២៣",
    "georgian": "გამარჯობა მსოფლიო ქართული ენა ႠႡႢ ᲐᲑᲒ",
    "armenian": "Բարեւ աշխարհ հայերեն լեզու և ՀԱՅ",
    "amharic": "ሰላም ዓለም አማርኛ ቋንቋ ፩፪፫ ።",
    "hangul": "안녕하세요 세계 한국어 텍스트 값 각 ㄱㄴ",
    "han": "你好世界 我想在 工作 中文文本 𠮷野家 漢字 一二三 ，。！",
    "kana": "こんにちは世界 カタカナ ﾊﾝｶｸ が ゔ 々ー 「引用」 ｆｕｌｌ",
    "mongolian": "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ ᠰᠠᠶᠢᠨ ᠪᠠᠶᠢᠨ᠎ᠠ ᠑᠒᠓",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 👍🏽 🇩🇪🇫🇷 ✅ ❤️ 1️⃣ 🦙.cpp ☃",
    "code": "def f(x): return {k: v**2} if x >= 10 // 0x1F && camelCase MAX <div> a[i]+=1; \\n ``` #!/",
}
JOINTS = [
    *(" " * 6),
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "",
    "-",
    ", ",
    "'s ",
    "...",
    "\u00a0",
    "\u3000",
]
NUMBERS = ["3", "42", "2024", "1,000,000", "3.14159", "½", "²", "Ⅷ", "100%", "1st", "007", "1_000"]
ENDS = [
    "",
    "",
    "",
    " ",
    "   ",
    "\n",
    "\n\n \n",
    "\t\t",
    "!",
    "?!?!",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\x00\x7f",
]
STRINGS_PER_SCRIPT = 100


def _string(rng, own, others):
    """Some words, mostly of one script, with blanks, digits, marks and case mixed in."""
    text = rng.choice(ENDS) if rng.random() < 0.3 else ""
    for _ in range(rng.randrange(1, 12)):
        kind = rng.random()
        word = rng.choice(NUMBERS) if kind < 0.15 else rng.choice(others) if kind < 0.25 else rng.choice(own)
        if rng.random() < 0.1:
            word = rng.choice([word.upper(), word.title(), word[::-1], word * 3])
        text += word + rng.choice(JOINTS)
    return text + rng.choice(ENDS)


def make_corpus() -> list[str]:
    rng = random.Random(17)
    words = {script: text.split() for script, text in WORDS.items()}
    every = [word for own in words.values() for word in own]
    return [_string(rng, own, every) for own in words.values() for _ in range(STRINGS_PER_SCRIPT)]
