"""The holder: owns the descriptors of a mount, and starts the daemon again when it dies.

    fusemig serve --resilient ──exec──> holder ──fork──> fusemig serve    (the daemon)
                                          │      └─────> fusemig serve    (the standby, which waits for its turn)
                                          └── $NOTIFY_SOCKET: FDSTORE=1, FDSTOREREMOVE=1, READY=1, STOPPING=1

It is the part of systemd that `fusemig.succession.fdstore` speaks to (``FileDescriptorStoreMax=``, ``Restart=``), and
as small as can be: stdlib only, one thread, no other I/O. Rules:

1. A daemon that said STOPPING=1, or that ended by itself before there was a mount, has ended: so does the holder, with
   its exit code. Any other end is followed by a successor with everything that is stored.
2. A successor begins when its predecessor is wholly dead, or what is left of that can do no harm (`dying`).
3. Messages count only from the daemon itself (SCM_CREDENTIALS); what it sent before its death counts.
4. Ends before READY=1, or within `QUICK_S` of it, are failures; but not, after READY=1, SIGKILL, which comes from
   outside, nor an exit with 0, which hands over.
   After `MAX_FAILURES` in a row the mount is *parked*: everything stays held, guests wait, until SIGHUP has it tried
   again or SIGTERM ends it.
5. X_FUSEMIG_UPGRADE=1 with a descriptor starts a *candidate* beside the standby: the command anew, with whatever is
   installed now. It talks with the daemon over that descriptor; X_FUSEMIG_HANDOVER=1 makes it the standby.
6. SIGTERM and SIGINT are the daemon's. If there is none, or it does not survive them, the holder unmounts; also at
   the second one if the daemon is dead but for threads that do not end.

If the holder dies the daemon goes on as an ordinary one.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time

from fusemig.succession.dying import waits_only_for_us

MAX_FAILURES = 5
QUICK_S = 5.0
PAUSES_S = (0.0, 0.0, 0.1, 0.2, 0.4)
"""Before the start after no failure, the first, the second, ... in a row."""
START_DEADLINE_S = 60.0
"""For a successor to say READY=1: one that looks at the mount before it serves it waits for itself."""
STANDBY_DELAY_S = 0.5
"""After READY=1: the guests that have waited come first."""
STANDBY_PAUSE_S = 10.0
"""Before the next standby where one has ended by itself, as in the middle of an installation."""
LOOK_S = 0.25
"""How often it is looked whether a daemon is dying without an end; nothing tells of that."""

_KILLED = 128 + int(signal.SIGKILL)
_FIRST = 3  # SD_LISTEN_FDS_START
_MAX_STORED = 253
"""A standby gets all in one message, and the kernel takes no more (SCM_MAX_FD). Daemons count (``$FDSTORE``)."""
_CREDENTIALS = struct.Struct("3i")
_STANDBY = "FUSEMIG_STANDBY"  # as in fdstore
_UPGRADE = "FUSEMIG_UPGRADE"  # as in fusemig.handover.agreement
_HOLDER = "FUSEMIG_HOLDER"


def say(text: str) -> None:
    """Tell a person."""
    print(f"fusemig: {text}", file=sys.stderr, flush=True)


class Holder:
    """The descriptors, the daemon, and the standby."""

    def __init__(self, mountpoint: str, command: list[str], *, has_standby: bool) -> None:
        """Start nothing yet; ``command`` is the daemon's."""
        self.mountpoint = mountpoint
        self.command = command
        self.has_standby = has_standby
        self.stored: dict[str, int] = {}
        self.daemon = 0
        self.is_ready = self.is_stopping = self.is_ending = self.is_given_up = self.is_parked = False
        self.since = 0.0
        self.n_failures = 0
        self.start_at: float | None = 0.0
        self.standby = 0
        self.standby_socket: socket.socket | None = None
        self.standby_at: float | None = None
        self.candidate = 0
        self.candidate_socket: socket.socket | None = None
        self.retired: socket.socket | None = None
        """Of a standby whose place a candidate took; it ends when this is closed."""
        self.last_code = 1
        self.signals, self.signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.notifications.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notifications.bind("")  # an abstract name that the kernel picks
        self.address = "@" + self.notifications.getsockname()[1:].decode()

    def run(self) -> int:
        """Hold until the end; return the exit code."""
        signal.set_wakeup_fd(self.signalled)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        poll = select.poll()
        poll.register(self.signals, select.POLLIN)
        poll.register(self.notifications, select.POLLIN)
        while True:
            poll.poll(self._patience_s() * 1000)
            self._hear()
            for received in self._received():
                self._handle(received)
            ended = self._reap()
            if self.daemon and not ended and waits_only_for_us(self.daemon):
                say(f"the daemon ({self.daemon}) is dead but for threads that wait for the mount: starting a successor")
                ended, self.last_code = True, _KILLED
            if self.daemon and not self.is_ready and self.stored and time.monotonic() - self.since > START_DEADLINE_S:
                say(f"the daemon ({self.daemon}) did not come up in {START_DEADLINE_S:.0f} s: killing it")
                os.kill(self.daemon, signal.SIGKILL)
                self.since = time.monotonic()
            if ended and self._has_ended():
                return self._end()
            if self.is_ending and (not self.daemon or self.is_given_up):
                return self._end()
            now = time.monotonic()
            if self.start_at is not None and now >= self.start_at:
                self._start_daemon()
            if self.standby_at is not None and now >= self.standby_at:
                self._start_standby()

    def _patience_s(self) -> float:
        times = [at for at in (self.start_at, self.standby_at) if at is not None]
        wait_s = LOOK_S if self.daemon else 3600.0
        return max(0.0, min([wait_s, *(at - time.monotonic() for at in times)]))

    # What the daemon says

    def _hear(self) -> None:
        while True:
            try:
                room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * _MAX_STORED)
                text, ancillary, _, _ = self.notifications.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            descriptors, sender = array.array("i"), 0
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
                elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    sender = _CREDENTIALS.unpack(data)[0]
            if sender and sender == self.daemon:
                lines = (line.partition("=") for line in text.decode(errors="replace").splitlines())
                self._obey({name: value for name, _, value in lines}, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    def _obey(self, said: dict[str, str], descriptors: array.array[int]) -> None:
        """Do what a message says; descriptors that are left in it are closed by the caller."""
        name = said.get("FDNAME", "stored")
        if said.get("FDSTORE") == "1" and descriptors and len(self.stored) < _MAX_STORED:
            replaced = self.stored.pop(name, None)
            self.stored[name] = descriptors.pop(0)
            if replaced is not None:
                os.close(replaced)
        if said.get("FDSTOREREMOVE") == "1" and name in self.stored:
            os.close(self.stored.pop(name))
        if said.get("READY") == "1":
            self._drop_retired()
            self.is_ready, self.since = True, time.monotonic()
            if self.has_standby and not self.standby:
                self.standby_at = self.since + STANDBY_DELAY_S
        if said.get("STOPPING") == "1":
            self.is_stopping = True
        if said.get("X_FUSEMIG_UPGRADE") == "1" and descriptors:
            self._drop_candidate()
            self.candidate_socket, self.candidate = self._fork_waiting([descriptors[0]])
        if said.get("X_FUSEMIG_HANDOVER") == "1" and self.candidate_socket is not None:
            self._drop_retired()
            self.retired = self.standby_socket  # its end would cost time while guests wait
            self.standby, self.standby_socket = self.candidate, self.candidate_socket
            self.candidate, self.candidate_socket = 0, None

    # Signals and ends

    def _received(self) -> bytes:
        try:
            return os.read(self.signals, 4096)
        except BlockingIOError:
            return b""

    def _handle(self, number: int) -> None:
        if number == signal.SIGHUP and self.is_parked:
            self.is_parked, self.n_failures, self.start_at = False, 0, time.monotonic()
        elif number in (signal.SIGTERM, signal.SIGINT):
            if self.is_ending and not os.path.exists(f"/proc/{self.daemon}/exe"):
                self.is_given_up = True  # what is left of it may wait for the mount, for ever
            self.is_ending = True
            if self.daemon:
                os.kill(self.daemon, number)

    def _reap(self) -> bool:
        """Bury who has ended; tell whether the daemon is among them."""
        is_over = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return is_over
            if not pid:
                return is_over
            if pid == self.daemon:
                is_over = True
                code = os.waitstatus_to_exitcode(status)
                self.last_code = code if code >= 0 else 128 - code
            elif pid == self.standby:
                self._drop_standby()
                self.standby_at = time.monotonic() + STANDBY_PAUSE_S
            elif pid == self.candidate:
                self._drop_candidate()

    def _has_ended(self) -> bool:
        """Take note of the daemon's end; return whether it is that of the mount."""
        self._hear()  # what it had said before
        pid, self.daemon = self.daemon, 0
        if self.is_stopping or self.is_ending or "fuse" not in self.stored:
            return True
        is_meant = self.is_ready and self.last_code in (0, _KILLED)  # handed over, or killed from outside
        is_quick = not self.is_ready or time.monotonic() - self.since < QUICK_S
        self.n_failures = self.n_failures + 1 if is_quick and not is_meant else 0
        if self.n_failures >= MAX_FAILURES:
            self.is_parked = True
            say(
                f"the daemon failed {self.n_failures} times in a row (now with {self.last_code}): {self.mountpoint} is "
                f"parked, its guests wait and nothing is lost. Remove the cause that the log shows, then kill -HUP "
                f"{os.getpid()} to try again; kill -TERM {os.getpid()} gives the mount up"
            )
            return False
        say(f"the daemon ({pid}) ended with {self.last_code}: starting a successor")
        self.start_at = time.monotonic() + PAUSES_S[min(self.n_failures, len(PAUSES_S) - 1)]
        return False

    def _end(self) -> int:
        """Let everything go; return the exit code."""
        for pid in filter(None, (self.standby, self.candidate)):  # they own nothing, and may still be starting
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._drop_standby()
        self._drop_candidate()
        is_mounted = "fuse" in self.stored
        for descriptor in self.stored.values():
            os.close(descriptor)
        if is_mounted:  # nobody did it: the daemon was killed while it ended, or there was none
            say(f"unmounting {self.mountpoint}: what its guests still wait for fails with ENOTCONN")
            for unmount in (["umount", "-f", "-l", "--"], ["fusermount3", "-u", "-z", "--"]):  # -f wakes who waits
                try:
                    pid = os.posix_spawnp(unmount[0], [*unmount, self.mountpoint], os.environ)
                except OSError:
                    continue
                if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
                    break
            return self.last_code or 1
        return self.last_code

    # Starts

    def _start_daemon(self) -> None:
        self.start_at = None
        self.is_ready = self.is_stopping = False
        self.since = time.monotonic()
        names = ":".join(self.stored).encode()
        if self.standby_socket is not None and self.stored:
            try:
                socket.send_fds(self.standby_socket, [names], list(self.stored.values()))
            except OSError:
                self._drop_standby()
            else:
                self.standby_socket.close()
                self.daemon, self.standby, self.standby_socket = self.standby, 0, None
                return
        self.daemon = self._fork({}, list(self.stored.values()))

    def _start_standby(self) -> None:
        self.standby_at = None
        if not self.standby:  # else a candidate has taken the place
            self.standby_socket, self.standby = self._fork_waiting([])

    def _fork_waiting(self, descriptors: list[int]) -> tuple[socket.socket, int]:
        """Start one that waits for its turn, on the socket that is returned; a candidate answers on a descriptor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = {_STANDBY: str(_FIRST)} | ({_UPGRADE: str(_FIRST + 1)} if descriptors else {})
        with theirs:
            return ours, self._fork(variables, [theirs.fileno(), *descriptors])

    def _drop_standby(self) -> None:
        """End the standby: it has gone, or is not needed."""
        if self.standby_socket is not None:
            self.standby_socket.close()  # which tells it
            self.standby_socket = None
        self.standby = 0

    def _drop_retired(self) -> None:
        if self.retired is not None:
            self.retired.close()
            self.retired = None

    def _drop_candidate(self) -> None:
        """End who was to succeed by an upgrade."""
        if self.candidate_socket is not None:
            self.candidate_socket.close()
            self.candidate_socket = None
        self.candidate = 0

    def _fork(self, environment: dict[str, str], descriptors: list[int]) -> int:
        """Start the command with ``descriptors`` from 3 on, as sd_listen_fds(3) says; return its process id."""
        variables = {**os.environ, **environment, "NOTIFY_SOCKET": self.address, _HOLDER: str(os.getpid())}
        variables["FDSTORE"] = str(_MAX_STORED)
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            if environment:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who serves
            else:
                variables["LISTEN_PID"], variables["LISTEN_FDS"] = str(os.getpid()), str(len(descriptors))
                variables["LISTEN_FDNAMES"] = ":".join(self.stored)
            spare = _FIRST + len(descriptors)
            copies = [
                fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, spare) for one in descriptors
            ]  # none in the way of another
            for number, copy in enumerate(copies, _FIRST):
                os.dup2(copy, number, inheritable=True)
            os.execve(self.command[0], self.command, variables)  # noqa: S606
        except BaseException as exc:
            say(f"cannot start {self.command[0]}: {exc}")
        os._exit(127)


def main(arguments: list[str]) -> int:
    """Hold the mount at a mount point: ``[--standby] MOUNTPOINT COMMAND...``."""
    has_standby = arguments[0] == "--standby"
    mountpoint, *command = arguments[has_standby:]
    return Holder(mountpoint, command, has_standby=has_standby).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
