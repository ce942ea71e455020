"""Text from files and libraries, made safe to show: control and invisible characters become escapes."""


def printable(text: str) -> str:
    """One line that any UTF-8 console can show."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shorten(text: str, length: int = 80) -> str:
    """The text, `printable`, cut to about `length` characters."""
    return printable(text if len(text) <= length else f"{text[: length - 3]}...")


def one_line(text: object) -> str:
    """The text, `printable`; of a very long one, beginning and end."""
    text = str(text)
    return printable(text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}")
