"""Virtual files over bytes, as `edgekit.llama.open_model` takes them."""


class Reader:
    """A virtual file over bytes that remembers what was read, in pieces of at most ``piece``."""

    def __init__(self, data: bytes, piece: int = 1 << 30) -> None:
        self.data, self.piece, self.calls = data, piece, list[tuple[int, int]]()

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, n: int) -> bytes:
        self.calls.append((offset, min(n, self.piece)))
        return self.data[offset : offset + min(n, self.piece)]


class IntoReader(Reader):
    def readinto(self, offset: int, buffer: memoryview) -> int:
        data = self.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)
