"""Text of a user in places where some characters mean more than themselves: terminals, Markdown tables."""


def make_printable(text):
    """Text in which control characters, and whatever else a terminal would not show as it is, are written as
    Python writes them: it stays on its line and changes no colours."""
    shown = []
    for character in str(text):
        shown.append(character if character.isprintable() else ascii(character)[1:-1])
    return "".join(shown)


def make_cell(text):
    """Text as a cell of a Markdown table, which ends neither the cell nor the line."""
    return make_printable(text).replace("\\", "\\\\").replace("|", "\\|")
