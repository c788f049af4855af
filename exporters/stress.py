"""Text that tokenizers disagree about: scripts, spaces, digits, code, odd characters.

Every piece is tokenized on its own. Written for this purpose; only characters of Unicode 13 or
older, because each library carries tables of another year.
"""

# ruff: noqa: RUF001 (the point is characters that look like others)

import itertools

_SCRIPTS = (
    "Größe, Straße und Übermut: „Fußgängerübergänge“ kosten 3,50 €.",
    "L'été où l'élève naïf œuvra à Noël, ça coûta 12 000 francs.",
    "¿Cuántos años tenía el pingüino? ¡Ninguno! El niño lo soñó.",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Árvíztűrő tükörfúrógép.",
    "Đường phố Hà Nội buổi sáng rất đông. İstanbul'da ışık yandı, ığdır.",
    "Съешь ещё этих мягких французских булок, да выпей чаю № 7.",
    "Ο καλύτερος δρόμος είναι ο πιο σύντομος· έτσι δεν είναι;",
    "שלום עולם, מה שלומך היום? בְּרֵאשִׁית 123.",
    "مرحبا بالعالم، كيف حالك؟ اَلْعَرَبِيَّةُ ١٢٣٤٥",
    "یک روز می‌خواهم به شیراز بروم؛ ۱۴۰۲ سال خوبی بود۔",
    "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय १२३४",
    "বাংলা ভাষায় একটি বাক্য। দশ হাজার ১০০০০",
    "தமிழ் எழுத்துகள் அழகானவை. తెలుగు అక్షరాలు. ಕನ್ನಡ. മലയാളം.",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ๑๒๓",
    "ລາວ ພາສາ. ភាសាខ្មែរ ១២៣. မြန်မာစာ ၁၂၃.",
    "ქართული ენა. Հայերեն լեզու։ አማርኛ ቋንቋ። ᏣᎳᎩ.",
    "中文没有空格，标点是全角的。价格：１２３元！「引号」《书名》",
    "繁體中文與简体字混排，臺灣、台湾。２０２４年１０月１日",
    "日本語の文章です。カタカナとひらがな、漢字が混ざる。ﾊﾝｶｸ １２３円",
    "한국어 문장입니다. 안녕하세요! 가격은 1,234원. ㄱㄴㄷ",
    "བོད་ཡིག མཚན། Монгол ᠮᠣᠩᠭᠣᠯ. ᐃᓄᒃᑎᑐᑦ.",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 𝟘𝟙𝟚 ℕℝℂ ﬁﬂ ½ ⅓ ² ³ ₄ Ⅳ ① ⑽",
)
_MARKS = (
    "e\u0301 vs é, n\u0303 vs ñ, A\u030a vs Å, o\u0308\u0304 vs ȫ",
    "क\u093c vs क़; \u1112\u1161\u11ab vs 한; が vs か\u3099",
    "Z\u0351\u036b\u0343a\u0300\u0301\u0302lgo\u0334\u0335",
    "a\u0301b\u0302 \u0301alone x\u20d7 1\u20e3 \u0644\u064e\u0651",
    "Ａｂｃ Ⅷ ﬀ ㎏ ㍿ K Å ſ",
)
_EMOJI = (
    "😀😃 👍🏽 ❤️ ☺ ✔︎ ⚠️",
    "👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👩🏾\u200d💻 🇩🇪🇯🇵 #️⃣ 1️⃣",
    "text😀text 😀 😀😀  😀!",
    "→ ← ⇒ ∀x∈ℝ: x² ≥ 0 ∧ ∑ᵢ aᵢ ≠ ∞ • – — … “q” ‘s’ «g» ‹h› § ¶ † ° ± × ÷",
    "$5 £6 ¥7 €8 ₹9 ₿1 50% 3‰ #tag @name C# a_b __x__ ~/.rc \\n",
)
_SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " leading",
    "  two leading",
    "trailing ",
    "trailing two  ",
    " both ",
    "a b  c   d    e     f",
    "a\tb\t\tc \t d\t ",
    "line\nline\n\nline\n\n\nline",
    "dos\r\nlines\r\n\r\nmixed\n\r\nend\r\n",
    "old\rmac\r\rlines",
    "x \n y\n z \n\n w  \n",
    "  \n  \n\n  indented\n    more\n\t\ttabs\n",
    "nbsp\u00a0here\u00a0\u00a0two narrow\u202fone ideographic\u3000one em\u2003one",
    "zero\u200bwidth soft\u00adhyphen bom\ufeff rtl\u200fltr\u200e word\u2060joiner",
    "line\u2028sep para\u2029sep next\u0085line form\x0cfeed vert\x0btab",
    " " * 40 + "x" + " " * 17 + "y",
    "\n" * 35 + "z" + "\n" * 5,
    "\t" * 20 + "t",
    "a" + " " * 8 + "\n" + " " * 8 + "b",
)
_NUMBERS = (
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159 -2.71828e-10 1,234,567.89 0x1F 0b101 1_000_000 1/2 12:34:56",
    "2024-02-29T23:59:59Z +49 (0)30 123456 192.168.0.1 v1.2.3-rc4 1st 2nd",
    "٠١٢٣٤٥٦٧٨٩ ०१२३४५६७८९ ０１２３４５６７８９ ೧೨೩",
    "a1b22c333d4444 99bottles H2O x86_64 ISO8601",
    "7" * 50,
)
_WORDS = (
    "I'm you're he's she'd we've they'll can't won't it's o'clock 'tis",
    "I'M YOU'RE HE'S SHE'D WE'VE THEY'LL CAN'T IT'S O'CLOCK",
    "I’m you’re it’s 'quoted' ''double'' 's 't 're 've 'm 'll 'd",
    "don't'd've 'S 'LL x's'y rock'n'roll",
    "Hello, world! Hello,world!Hello ,world ! (parens)[brackets]{braces}<angles>",
    "camelCase PascalCase snake_case kebab-case SCREAMING_CASE mIxEdCaSe iPhone eBay",
    "e.g. i.e. U.S.A. Mr. Smith... wait?! What!? --- *** === ### ///",
    "end.Start end!Start end;start a,b;c:d a/b a\\b a|b a&b a+b a=b a*b",
    "https://user:pass@example.com:8080/a/b.html?q=1&r=%20#frag me@example.org",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "antidisestablishmentarianism floccinaucinihilipilification",
    "a" * 70,
    "ab" * 40,
    "é" * 20 + "中" * 20 + "😀" * 10,
    "!" * 33 + "?" * 9 + "." * 64,
    "-" * 80,
    "the THE The tHE",
)
_CODE = (
    'def f(x: int = 0, *args, **kw) -> "T":\n    """Doc."""\n    return {k: v**2 for k in x}\n',
    "for (int i = 0; i < n; ++i) {\n\tif (a[i] != b[i]) return -1; // differs\n}\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 0xFF); }\n',
    "SELECT * FROM t WHERE a >= 1 AND b LIKE '%x%' -- comment\n",
    "<div class=\"a b\" id='c'>&nbsp;&lt;text&gt;</div><!-- c -->\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9\\n"}}\n',
    "$ git log --oneline | grep -E '^[0-9a-f]{7}' && echo \"$HOME\" > /dev/null 2>&1",
    "let x = y?.z ?? `t${a}`; const f = async () => { await g(); };\n",
    "\\begin{equation} \\frac{\\alpha}{\\beta} = \\sum_{i=1}^{n} x_i^2 \\end{equation}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- item\n  - sub\n\n```py\nprint('x')\n```\n",
    "class A<T extends B & C> : D { get => this._x; } // ~A() @Override #pragma\n",
    "        if x:\n            y += 1\n\n\n        else:\n\n            z -= 1\n",
)
_ODD = (
    "",
    "\x00 nul \x01\x02 \x1b[0m \x7f",
    "<0x0A> <0x41><0xFF> ▁ ▁▁ a▁b Ġ Ċ ĉ â",
    "\ufffd replacement \U0010ffff last \ue000 private",
    "𐍈𐌰 𒀀𒁀 𓀀𓁀 🀀🀄 𠀀𠮷",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|><|end_of_text|><|eot_id|><|end|><|user|> [INST] [/INST] <bos><eos>",
    "<start_of_turn>user\nhi<end_of_turn>\n [PAD0] [PAD] [MASK] <mask> <unused0>",
    "< s > <|endof text|> <|im_start <unk <s></s><unk>",
)

PIECES: tuple[str, ...] = tuple(
    itertools.chain(_SCRIPTS, _MARKS, _EMOJI, _SPACES, _NUMBERS, _WORDS, _CODE, _ODD)
)


def pieces_for(special: tuple[str, ...]) -> tuple[str, ...]:
    """Return `PIECES` and pieces with the texts of a tokenizer's special tokens in them.

    Args:
        special: Texts of special tokens; the first 24 are used.
    """
    made = []
    for token in special[:24]:
        made += [token, f"a{token}b", f"one {token}two", token * 2, f"{token}\n{token} x"]
    return PIECES + tuple(made) + ("\n".join(PIECES),)
