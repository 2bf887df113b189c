"""Runs in the process of a program that a model wrote, before that program: shuts off what it has no need of.

    python -I -S confine.py CPU_SECONDS MEMORY_BYTES OPEN_FILES FILE_BYTES PROGRAM END

What is written first is what could not be shut off, such as "[processes network files] ", and what is written last,
behind the program's own output, is END: an exit code of 0 alone may be the program's own. Only the standard library,
nothing of this package. Linux on x86-64 and aarch64 has everything; elsewhere limits are what there is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

NEW_USER, NEW_NET, THREAD = 0x10000000, 0x40000000, 0x10000  # of clone(2) and unshare(2)
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2  # of prctl(2)
LANDLOCK, EPERM, ENOSYS = 444, 1, 38  # landlock_create_ruleset and the two calls behind it
#: machine -> audit name, clone, clone3, and the calls that are refused: new processes and programs, signals, traces,
#: sockets, sessions and namespaces, limits, io_uring, mounts, BPF
CALLS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E, 56, 435,
        (57, 58, 59, 322, 62, 200, 234, 129, 297, 424, 434, 101, 310, 311, 41, 53, 112, 109, 272, 308, 160, 302,
         425, 426, 427, 165, 428, 429, 430, 442, 321, 250, 248, 249),
    ),
    "aarch64": (
        0xC00000B7, 220, 435,
        (221, 281, 129, 130, 131, 138, 240, 424, 434, 117, 270, 271, 198, 199, 157, 154, 97, 268, 164, 261,
         425, 426, 427, 40, 428, 429, 430, 442, 280, 219, 217, 218),
    ),
}  # fmt: skip
#: Of a file system, landlock's rights by version; the first three are to execute, to read a file, to list a folder
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
WRITE, READ = 1 << 1, 0b1100 | 1


def limit(seconds: int, memory: int, files: int, size: int) -> None:
    """Of this process; as far as the system's own limits go."""
    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_NPROC: 0,  # root is above this one
        resource.RLIMIT_CORE: 0,
    }
    for what, value in wanted.items():
        most = resource.getrlimit(what)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))


def leave_network(libc: ctypes.CDLL) -> bool:
    """A network namespace without any interface, in a user namespace, which takes root's rights too."""
    return not libc.unshare(NEW_USER | NEW_NET) or not libc.unshare(NEW_NET)


def read_only(libc: ctypes.CDLL, readable: list[str]) -> bool:
    """By Landlock: nothing can be written, made, renamed or removed, and only what is below `readable` be read.

    What is open stays open.
    """
    version = libc.syscall(LANDLOCK, None, 0, 1)
    if version < 1 or libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    handled = RIGHTS.get(version, RIGHTS[5])
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)  # connect, bind; sockets, signals
    attributes = struct.pack("=QQQ", handled, network, scopes)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(LANDLOCK, attributes, len(attributes), 0)
    if rules < 0:
        return False
    for path in readable:
        try:
            place = os.open(path, os.O_PATH)
        except OSError:
            continue
        # a file takes the rights of files only
        rights = READ if os.path.isdir(path) else READ & ~8
        rights |= WRITE if path == os.devnull else 0
        refused = libc.syscall(LANDLOCK + 1, rules, 1, struct.pack("=Qi", rights & handled, place), 0)
        os.close(place)
        if refused:
            return False
    done = not libc.syscall(LANDLOCK + 2, rules, 0)
    os.close(rules)
    return done


def filter_calls(libc: ctypes.CDLL) -> bool:
    """By seccomp: threads may be begun, processes and programs may not; no sockets, no signals, no other limits."""
    if platform.machine() not in CALLS or struct.calcsize("P") != 8:
        return False
    machine, clone, clone3, refused = CALLS[platform.machine()]
    load, equal, at_least, has_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, missing, allow, kill = 0x50000 | EPERM, 0x50000 | ENOSYS, 0x7FFF0000, 0x80000000
    code = [
        (load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill),  # calls of another kind of program
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse),
        (equal, 0, 1, clone3), (give, 0, 0, missing),  # its flags are out of sight: the C library then takes clone
    ]  # fmt: skip
    for call in refused:
        code += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    code += [
        (equal, 0, 3, clone), (load, 0, 0, 16), (has_bit, 1, 0, THREAD), (give, 0, 0, refuse), (give, 0, 0, allow)
    ]  # fmt: skip
    program = b"".join(struct.pack("=HBBI", *one) for one in code)
    holder = ctypes.create_string_buffer(program, len(program))
    about = struct.pack("@HP", len(code), ctypes.addressof(holder))
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return not libc.prctl(SET_SECCOMP, FILTER, about, 0, 0)


def main() -> None:
    path, end = sys.argv[5:7]
    with open(path, encoding="utf-8") as file:
        source = file.read()
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = leave_network(libc)
    limit(*map(int, sys.argv[1:5]))
    standard = os.path.dirname(os.path.dirname(os.__file__))  # of Python: its library and what that is linked to
    others = ["/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", os.devnull, "/dev/urandom"]
    files = read_only(libc, [standard, *others])
    calls = filter_calls(libc)
    shut = {"processes": calls, "network": namespace or calls, "files": files}
    os.write(1, f"[{' '.join(name for name, held in shut.items() if not held)}] ".encode())
    sys.argv = [path]
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os.write(1, end.encode())


if __name__ == "__main__":
    main()
