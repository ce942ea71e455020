"""How text of files is escaped where it is shown: on the console."""

import sys

from utils.text import one_line, printable, shorten


def test_every_sign_is_shown_or_escaped():
    """Fault: a control character, a change of direction or a sign without width reaches the terminal."""
    for number in range(sys.maxunicode + 1):
        sign = chr(number)
        text = printable(sign)
        assert text.isprintable()
        assert text == sign if sign.isprintable() else text.isascii()
    dangerous = [0x00, 0x07, 0x08, 0x0A, 0x0D, 0x1B, 0x7F, 0x9B, 0xAD, 0x61C, 0x200B, 0x200E, 0x200F, 0xFEFF, 0xE0041]
    for number in (*dangerous, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        assert printable(chr(number)) == chr(number).encode("unicode_escape").decode()
    assert printable("café 東京 हिन्दी 😀 [31m") == "café 東京 हिन्दी 😀 [31m"
    assert printable("\udcff") == "\\udcff"


def test_long_texts():
    """Fault: an error message of a gigabyte, or one whose end, which says what to do, is cut off."""
    assert shorten("x" * 100) == "x" * 77 + "..." and shorten("x" * 80) == "x" * 80
    assert one_line("a" * 10_000 + "remedy") == f"{'a' * 600} ... {'a' * 294}remedy"
    assert one_line("a\nb") == "a\\nb"
