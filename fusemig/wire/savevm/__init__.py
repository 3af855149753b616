"""The container of QEMU's migration streams (`migration/savevm.c`), version 3, as QEMU 2.4 to 9.0 write it.

    QEVM, version                           8 bytes, once
    CONFIGURATION  machine, subsections     the machine type's name; what has other values than usual
    COMMAND        number, length, data     such as OPEN_RETURN_PATH and PING
    START          id, name, instance, version, contents, footer      a live section begins: `block`, `ram`
    PART, END      id, contents, footer     more of it; END is the last
    FULL           id, name, instance, version, contents, footer      a device's state, once all live sections ended
    EOF
    VMDESC         length, JSON             what the FULL sections consisted of; may be missing

All numbers are big-endian. No section says how long it is: whoever cannot parse its contents is lost. So:

- the contents of `block` go to the decoder that was given for them, `ram` is parsed here in order to skip it, and any
  other live section is refused by its name, before a byte is lost;
- device state cannot be parsed without the code of every device, and need not be: nothing that follows it is for us.
  From the first FULL section on all bytes are drained unseen until the source closes. They are complete if they end as
  a stream does: a footer, EOF, and a VMDESC whose length leads exactly to the last byte (or, without one, a footer and
  EOF). `may_end` says so; a source with a return path waits for `encode_shut` then instead of closing.

Whatever the bytes, the decoder raises only `RemoteProtocolError`; its memory is fixed, however much is skipped.

    elements   the marks of all that, commands, and what a stream means: events
    encoder    elements out
    decoder    bytes in, events out; ram: what it skips; drain: what it does not look at
"""

from fusemig.wire.savevm.decoder import Decoder as Decoder
from fusemig.wire.savevm.elements import MAGIC as MAGIC
from fusemig.wire.savevm.elements import Command as Command
from fusemig.wire.savevm.elements import CommandType as CommandType
from fusemig.wire.savevm.elements import Configuration as Configuration
from fusemig.wire.savevm.elements import DeviceState as DeviceState
from fusemig.wire.savevm.elements import Event as Event
from fusemig.wire.savevm.elements import SectionEnd as SectionEnd
from fusemig.wire.savevm.elements import StreamEnd as StreamEnd
from fusemig.wire.savevm.encoder import encode_end as encode_end
from fusemig.wire.savevm.encoder import encode_eof as encode_eof
from fusemig.wire.savevm.encoder import encode_footer as encode_footer
from fusemig.wire.savevm.encoder import encode_header as encode_header
from fusemig.wire.savevm.encoder import encode_part as encode_part
from fusemig.wire.savevm.encoder import encode_pong as encode_pong
from fusemig.wire.savevm.encoder import encode_shut as encode_shut
from fusemig.wire.savevm.encoder import encode_start as encode_start
