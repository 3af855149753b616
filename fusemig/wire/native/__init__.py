"""The native wire: framed, checked, acknowledged.

    stripes    the bytes of all that, cut in pieces for several connections
    messages   what the two sides say to each other in JSON
    frames     the types of frames, and their bytes
    decoder    bytes in, events out

`docs/wire-native.md` describes it. Everything here is pure.
"""

from fusemig.wire.native.decoder import Decoder as Decoder
from fusemig.wire.native.frames import FROM_DESTINATION as FROM_DESTINATION
from fusemig.wire.native.frames import FROM_SOURCE as FROM_SOURCE
from fusemig.wire.native.frames import HEADER_SIZE as HEADER_SIZE
from fusemig.wire.native.frames import MAGIC as MAGIC
from fusemig.wire.native.frames import MAX_EXTENTS as MAX_EXTENTS
from fusemig.wire.native.frames import MAX_MESSAGE as MAX_MESSAGE
from fusemig.wire.native.frames import MAX_SEPARATORS as MAX_SEPARATORS
from fusemig.wire.native.frames import MESSAGE_TYPES as MESSAGE_TYPES
from fusemig.wire.native.frames import PREFACE as PREFACE
from fusemig.wire.native.frames import SEQUENCED as SEQUENCED
from fusemig.wire.native.frames import VERSION as VERSION
from fusemig.wire.native.frames import Ack as Ack
from fusemig.wire.native.frames import BaseFrame as BaseFrame
from fusemig.wire.native.frames import DataFrame as DataFrame
from fusemig.wire.native.frames import Event as Event
from fusemig.wire.native.frames import Frame as Frame
from fusemig.wire.native.frames import FrameType as FrameType
from fusemig.wire.native.frames import Message as Message
from fusemig.wire.native.frames import PackedFrame as PackedFrame
from fusemig.wire.native.frames import Span as Span
from fusemig.wire.native.frames import ZeroFrame as ZeroFrame
from fusemig.wire.native.frames import encode_ack as encode_ack
from fusemig.wire.native.frames import encode_base as encode_base
from fusemig.wire.native.frames import encode_data as encode_data
from fusemig.wire.native.frames import encode_message as encode_message
from fusemig.wire.native.frames import encode_packed as encode_packed
from fusemig.wire.native.frames import encode_zero as encode_zero
from fusemig.wire.native.messages import DELTA as DELTA
from fusemig.wire.native.messages import HAVE_HASHES as HAVE_HASHES
from fusemig.wire.native.messages import HAVE_VALUES as HAVE_VALUES
from fusemig.wire.native.messages import KEEP_RUNS as KEEP_RUNS
from fusemig.wire.native.messages import MAX_DISK_RUNS as MAX_DISK_RUNS
from fusemig.wire.native.messages import MAX_FETCH_BLOCKS as MAX_FETCH_BLOCKS
from fusemig.wire.native.messages import MAX_FETCH_RUNS as MAX_FETCH_RUNS
from fusemig.wire.native.messages import MAX_HOT as MAX_HOT
from fusemig.wire.native.messages import MAX_RUNS as MAX_RUNS
from fusemig.wire.native.messages import POSTCOPY as POSTCOPY
from fusemig.wire.native.messages import RESUME as RESUME
from fusemig.wire.native.messages import THIN as THIN
from fusemig.wire.native.messages import WEIGHED_CHUNKS as WEIGHED_CHUNKS
from fusemig.wire.native.messages import ZSTD as ZSTD
from fusemig.wire.native.messages import Abort as Abort
from fusemig.wire.native.messages import Answer as Answer
from fusemig.wire.native.messages import Ask as Ask
from fusemig.wire.native.messages import AskedDisk as AskedDisk
from fusemig.wire.native.messages import Commit as Commit
from fusemig.wire.native.messages import Covered as Covered
from fusemig.wire.native.messages import Delta as Delta
from fusemig.wire.native.messages import DiskOffer as DiskOffer
from fusemig.wire.native.messages import DiskProof as DiskProof
from fusemig.wire.native.messages import Fetch as Fetch
from fusemig.wire.native.messages import FinalProofs as FinalProofs
from fusemig.wire.native.messages import Have as Have
from fusemig.wire.native.messages import Hello as Hello
from fusemig.wire.native.messages import Join as Join
from fusemig.wire.native.messages import Joined as Joined
from fusemig.wire.native.messages import Journaled as Journaled
from fusemig.wire.native.messages import Keep as Keep
from fusemig.wire.native.messages import Kept as Kept
from fusemig.wire.native.messages import Lend as Lend
from fusemig.wire.native.messages import Like as Like
from fusemig.wire.native.messages import Missing as Missing
from fusemig.wire.native.messages import PreparedProofs as PreparedProofs
from fusemig.wire.native.messages import Probe as Probe
from fusemig.wire.native.messages import Probed as Probed
from fusemig.wire.native.messages import Progress as Progress
from fusemig.wire.native.messages import Refuse as Refuse
from fusemig.wire.native.messages import Released as Released
from fusemig.wire.native.messages import Resumption as Resumption
from fusemig.wire.native.messages import SharedBase as SharedBase
from fusemig.wire.native.messages import Streams as Streams
from fusemig.wire.native.messages import Sync as Sync
from fusemig.wire.native.messages import Synced as Synced
from fusemig.wire.native.messages import Taken as Taken
from fusemig.wire.native.messages import Weigh as Weigh
from fusemig.wire.native.messages import Weighed as Weighed
from fusemig.wire.native.messages import Welcome as Welcome
from fusemig.wire.native.messages import Whole as Whole
from fusemig.wire.native.stripes import MAX_STREAMS as MAX_STREAMS
