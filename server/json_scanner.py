"""JSON that is still being written: whether it may become valid, and where in it a character stands.

scanner = JsonScanner()
for char in text:
    scanner.put(char)  # ValueError: no JSON object begins like this
is_complete = scanner.depth == 0
"""

import re

SPACE = " \t\n\r"
SCALAR = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class JsonScanner:
    """Follows a JSON object one character at a time (RFC 8259). `depth`: open brackets, 0 before it and behind it.
    `expects`: what may come next, outside of strings and scalars: "value", "value or end", "key", "key or end", ":"
    or ","."""

    def __init__(self):
        self.brackets: list[str] = []
        self.expects = "value"
        self.in_string = False
        self.escape = 0  # 1: after a backslash; 5 to 2: before that many hexadecimal digits less one
        self.scalar = ""  # a number, true, false or null so far

    @property
    def depth(self) -> int:
        """How many brackets are open."""
        return len(self.brackets)

    @property
    def in_token(self) -> bool:
        """Within a string or a scalar."""
        return self.in_string or bool(self.scalar)

    def put(self, char: str) -> None:
        """Takes the next character. ValueError if there is no JSON that goes on so."""
        if self.in_string:
            self._string(char)
            return
        if self.scalar:
            if char not in SPACE + ",]}":
                self.scalar += char
                return
            if not SCALAR.fullmatch(self.scalar):
                raise ValueError(f"{self.scalar} is no JSON")
            self.scalar = ""
            self.expects = ","
        if char in SPACE:
            return
        wants_value = self.expects.startswith("value")
        if char == '"' and (wants_value or self.expects.startswith("key")):
            self.in_string = True
        elif char in "{[" and wants_value:
            self.brackets.append(char)
            self.expects = "key or end" if char == "{" else "value or end"
        elif char in "}]" and self.brackets and self._may_end(char):
            self.brackets.pop()
            self.expects = ","
        elif char == ":" and self.expects == ":":
            self.expects = "value"
        elif char == "," and self.expects == "," and self.brackets:
            self.expects = "key" if self.brackets[-1] == "{" else "value"
        elif wants_value and char in "-0123456789tfn" and self.brackets:
            self.scalar = char
        else:
            raise ValueError(f"{char} where JSON has {self.expects}")

    def _may_end(self, char: str) -> bool:
        return self.brackets[-1] + char in ("{}", "[]") and (self.expects == "," or self.expects.endswith("end"))

    def _string(self, char: str) -> None:
        if self.escape > 1:
            if char not in "0123456789abcdefABCDEF":
                raise ValueError(f"\\u with {char}")
            self.escape = 0 if self.escape == 2 else self.escape - 1
        elif self.escape:
            if char not in '"\\/bfnrtu':
                raise ValueError(f"the escape \\{char}")
            self.escape = 5 if char == "u" else 0
        elif char == "\\":
            self.escape = 1
        elif char == '"':
            self.in_string = False
            self.expects = ":" if self.expects.startswith("key") else ","
        elif char < " ":
            raise ValueError("a control character in a string")
