"""The binary records that the agent and the planner exchange. The planner imports this, so it imports little.

The planner's input is MARK, the digest that the table of contents of an eStargz blob must have, HEADER for the wanted
blob with its tail, then HEADER and tail of each kept blob. The tail is everything from the begin of the table of
contents (with what is around it) to the end of the blob. The planner's output is the file ``plan`` of RECORDs.
"""

from __future__ import annotations

import struct

MARK = b"podkeel parts 1\n"
DIGEST_BYTES = 32
PLAN_FILE = "plan"
MADE_FILE = "made"
MOST_RANGES = 1000
LARGEST_TAIL = 64 << 20
LARGEST_PLAIN = 128 << 20

# The format of a blob: zstd:chunked; put together by an earlier partial pull; eStargz.
ZSTD_CHUNKED, ASSEMBLED, ESTARGZ = 1, 2, 3

# Format, size of the blob, begin of its tail; of the table of contents: offset, size, size unpacked; of tar-split: the
# same. Offsets count from the begin of the blob.
HEADER = struct.Struct("<9Q")

# Kind, number of the kept blob, offset, size.
RECORD = struct.Struct("<IIQQ")
# Bytes from the registry, from a kept blob, from the tail of the wanted blob, from the file ``made``.
FETCHED, KEPT, TAIL, MADE = 0, 1, 2, 3

# Put at the end of a blob that a partial pull has put together: a skippable zstd frame with the places of its chunks
# (compressed INDEX_ENTRYs), then one with INDEX_FOOTER.
INDEX_MARK = b"PODKEEL1"
INDEX_ENTRY = struct.Struct("<32sQQQ")  # digest, size, offset in the blob, size in the blob
INDEX_FOOTER = struct.Struct("<QQQ8s")  # offset, size and unpacked size of the index; the mark
SKIPPABLE = struct.Struct("<II")
SKIPPABLE_MAGIC = 0x184D2A5D
FOOTER_BYTES = SKIPPABLE.size + INDEX_FOOTER.size
