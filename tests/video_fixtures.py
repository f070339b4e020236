"""Small video files, written by PyAV on the spot."""

from pathlib import Path

import av
import numpy as np


def film(path, *, frames=30, size=(64, 48), rate=10, codec="mpeg4", rotation=0):
    """A clip whose frame k is grey 8 k on the left and white on the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(frames):
            picture = np.full((size[1], size[0], 3), 8 * (k % 30), np.uint8)
            picture[:, size[0] // 2 :] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    if rotation:
        turn(path, rotation)
    return str(path)


def turn(path, degrees):
    """Writes the display matrix of a rotation into the track header of an mp4."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    data = bytearray(Path(path).read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # version 0: flags, times, id, duration, layer, volume before it
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    Path(path).write_bytes(data)
