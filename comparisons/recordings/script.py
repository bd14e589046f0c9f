"""What the players share: a conversation in the form in which it is played."""

from comparisons.recordings.format import Conversation, Side

CLIENT, SERVER = 0, 1
SIDES: tuple[Side, Side] = ("client", "server")
DATA, END, RESET = 0, 1, 2
KINDS = {"data": DATA, "end": END, "reset": RESET}


class Script:
    """A conversation, prepared for playing: what each side says as one string, and for each step where in it
    it ends, so that a step is a comparison of numbers while it is played.
    """

    __slots__ = ("answers", "following", "kinds", "marks", "sides", "start", "streams", "whens")

    def __init__(self, conversation: Conversation, first_us: int) -> None:
        steps = conversation.steps
        self.start = conversation.start_us - first_us
        self.whens = [each.when_us for each in steps]
        self.sides = [SIDES.index(each.who) for each in steps]
        self.kinds = [KINDS[each.what] for each in steps]
        streams = (bytearray(), bytearray())
        self.marks: list[int] = []
        for step, side in zip(steps, self.sides, strict=True):
            streams[side].extend(step.data)
            self.marks.append(len(streams[side]))
        self.streams = (bytes(streams[CLIENT]), bytes(streams[SERVER]))
        # following[side][i]: the first step of that side at or after i; the number of steps if there is none
        self.following = tuple([len(steps)] * (len(steps) + 1) for _ in SIDES)
        # whether step i is the last of an answer: server's data after client's, up to the client's next data
        self.answers = [False] * len(steps)
        last_of_answer = True
        for index in reversed(range(len(steps))):
            for side in (CLIENT, SERVER):
                here = self.sides[index] == side
                self.following[side][index] = index if here else self.following[side][index + 1]
            if self.kinds[index] == DATA:
                self.answers[index] = self.sides[index] == SERVER and last_of_answer
                last_of_answer = self.sides[index] == CLIENT
        for index in range(len(steps)):
            if self.kinds[index] == DATA and self.sides[index] == CLIENT:
                break
            self.answers[index] = False  # nobody has asked yet


def alike(data: bytes | memoryview, wanted: bytes) -> int:
    """How many first bytes of both are equal."""
    length = min(len(data), len(wanted))
    return next((index for index in range(length) if data[index] != wanted[index]), length)
