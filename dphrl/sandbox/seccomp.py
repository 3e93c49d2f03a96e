"""A system-call filter for a process that computes and answers: the kernel denies it what it never needs.

It is a deny list, because the interpreter and the libraries under it change their harmless calls from version to
version. Everything that reaches outside the process is on it: sockets, programs, processes and threads, signals,
writing to or rearranging the file system, and the settings that would loosen the limits again. Calls numbered from
`_FIRST_NEW_CALL` on fail as if they did not exist; an older kernel does the same, and the C library can handle that.

Reading files is not denied. This module imports only the standard library, because the child process starts with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# By name: (number on x86_64, number on aarch64), None where the architecture has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # processes, threads and programs
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191),
    "semtimedop": (220, 192), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # who runs when
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
    # its own limits and privileges
    "setrlimit": (160, 164), "prctl": (157, 167), "seccomp": (317, 277), "unshare": (272, 97), "setns": (308, 268),
    "personality": (135, 92), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145),
    "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159),
    "capset": (126, 91), "setsid": (112, 157), "setpgid": (109, 154), "mlockall": (151, 230),
    # the file system; opening a file for writing is handled below
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45), "ftruncate": (77, 46),
    "fallocate": (285, 47), "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88),
    "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "sync": (162, 81), "syncfs": (306, 267), "fanotify_init": (300, 262),
    # the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "acct": (163, 89), "iopl": (172, None), "ioperm": (173, None), "syslog": (103, 116),
}  # fmt: skip
# (number of the call, index of the argument, low or high half of it, bits): denied when that half has one of these
# bits. They are the flags of open and openat, and the pointer to new limits of prlimit64; both halves of the pointer
# are tested, one by one, because BPF compares 32 bits.
_OPEN_TO_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ANY_BIT = 0xFFFF_FFFF
_DENIED_BY_ARGUMENT: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "x86_64": ((2, 1, 0, _OPEN_TO_CHANGE), (257, 2, 0, _OPEN_TO_CHANGE), (302, 2, 0, _ANY_BIT), (302, 2, 1, _ANY_BIT)),
    "aarch64": ((56, 2, 0, _OPEN_TO_CHANGE), (261, 2, 0, _ANY_BIT), (261, 2, 1, _ANY_BIT)),
}
# (number of the call, index of the argument, value): denied when the low half of the argument is this value. They are
# ways to have the kernel send a signal to another process whenever a file of one's own is ready.
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 10, 15, 0x8901, 0x8902
_FCNTL, _IOCTL = {"x86_64": 72, "aarch64": 25}, {"x86_64": 16, "aarch64": 29}
_DENIED_BY_VALUE = (
    *((_FCNTL, 1, command) for command in (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX)),
    *((_IOCTL, 1, command) for command in (_FIOSETOWN, _SIOCSPGRP)),
)
# From here on every architecture has the same numbers: io_uring, pidfd, clone3, openat2 and all calls that will come.
# x86_64's second calling convention (x32) lies above it too.
_FIRST_NEW_CALL = 424
_AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_CALL_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16


def unsupported() -> str:
    """Why this machine's architecture has no filter here; "" where it has one."""
    machine = platform.machine()
    return "" if machine in _AUDIT_ARCH else f"no system-call filter for {machine}, only for {', '.join(_AUDIT_ARCH)}"


def install() -> None:
    """Filter every later system call of this process, for good. Raises OSError where the kernel refuses."""
    program = _program(platform.machine())
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0)):
        if libc.prctl(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments)):
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({arguments[0]}): {os.strerror(number)}")


def _program(machine: str) -> bytes:
    column = list(_AUDIT_ARCH).index(machine)
    deny = _instruction(_RETURN, _ERRNO | errno.EPERM)
    load_call = _instruction(_LOAD, _CALL_OFFSET)
    code = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[machine], if_true=1),
        _instruction(_RETURN, _KILL),
        load_call,
        _instruction(_JUMP_GREATER_EQUAL, _FIRST_NEW_CALL, if_false=1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            code += [_instruction(_JUMP_EQUAL, number, if_false=1), deny]
    tests = [(call, argument, half, _JUMP_SET, bits) for call, argument, half, bits in _DENIED_BY_ARGUMENT[machine]]
    tests += [(calls[machine], argument, 0, _JUMP_EQUAL, value) for calls, argument, value in _DENIED_BY_VALUE]
    for number, argument, half, jump, operand in tests:
        offset = _ARGUMENTS_OFFSET + 8 * argument + 4 * half
        code += [
            _instruction(_JUMP_EQUAL, number, if_false=4),
            _instruction(_LOAD, offset),
            _instruction(jump, operand, if_false=1),
            deny,
            load_call,
        ]
    return b"".join([*code, _instruction(_RETURN, _ALLOW)])


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, operand)
