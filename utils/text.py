"""Text that strangers wrote (cells, ids, file names, metadata, a library's words about them), made safe to show.

A terminal obeys control characters: they move the cursor, hide text, set its title, or answer as if typed. Signs that
change the direction of text, or have no width, make a line read as what it is not. All of them are shown as escapes.
"""



def printable(text: str) -> str:
    """One line that any UTF-8 console can show."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shorten(text: str, most: int = 80) -> str:
    """The text, `printable`, of about `most` characters."""
    return printable(text if len(text) <= most else f"{text[: most - 3]}...")


def one_line(text: object) -> str:
    """What goes to the console: one line; of a very long one, beginning and end."""
    text = str(text)
    return printable(text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}")
