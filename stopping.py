"""Stop strings: where a text ends before its time, found across the pieces that it comes in.

stops = StopStrings(("\n\n", "User:"))
for piece in pieces:
    print(stops.put(piece), end="")
    if stops.found:
        break
print(stops.finish())
"""


class StopStrings:
    """Text in, text out as soon as it cannot be part of a stop string any more.

    The text ends at the stop string that is complete first (the longest of those that end together), so it is the same
    however it is cut into pieces. `found`: it has come to its end; nothing more is shown.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops = stops
        self.held = ""  # the longest end of the text that a stop string begins with
        self.found = False

    def put(self, text: str) -> str:
        """What can be shown now that `text` has come."""
        if self.found or not self.stops:
            return "" if self.found else text
        text = self.held + text
        starts = [(text.find(stop), stop) for stop in self.stops]
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)[1]]
        lengths = range(min(len(text), max(map(len, self.stops)) - 1), 0, -1)
        held = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        shown, self.held = text[: len(text) - held], text[len(text) - held :]
        return shown

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self.held = self.held, ""
        return held
