"""Has libvirt 9.0 ask a monitor for query-migrate, by its own client of QMP and its own parser, without its daemon.

    libvirt.py FOLDER SOCKET        FOLDER has libvirt.so.0 and what it needs

For each line on standard input it asks once and prints as JSON the status and the numbers that libvirt has got, or its
error. libvirt's driver for QEMU exports its functions. Two of its structures are filled here by offset, as they are in
Debian's 9.0.0 for x86-64; another version is refused.
"""

import ctypes
import json
import sys

VERSION = 9_000_000
POINTER = ctypes.c_void_p
NUMBERS = 40

folder, socket = sys.argv[1:]
libvirt = ctypes.CDLL(f"{folder}/libvirt.so.0", mode=ctypes.RTLD_GLOBAL)
driver = ctypes.CDLL(f"{folder}/libvirt/connection-driver/libvirt_driver_qemu.so")
libc = ctypes.CDLL(None)


def function(library, name, result, *arguments):
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


def call(library, name, *arguments, result=POINTER):
    return function(library, name, result, *[POINTER] * len(arguments))(*arguments)


def fail(what):
    said = function(libvirt, "virGetLastErrorMessage", ctypes.c_char_p)() or b""
    sys.exit(f"{what}: {said.decode()}")


version = ctypes.c_ulong()
if call(libvirt, "virInitialize", result=ctypes.c_int) != 0:
    fail("virInitialize")
call(libvirt, "virGetVersion", ctypes.byref(version), None, None, result=ctypes.c_int)
if version.value != VERSION:
    sys.exit(f"this is libvirt {version.value}; the offsets are those of {VERSION}")

# A domain that runs, with no private data.
options = call(libvirt, "virDomainXMLOptionNew", *[None] * 6)
domain = call(libvirt, "virDomainObjNew", options)
definition = call(libvirt, "virDomainDefNew", options)
ctypes.c_int.from_address(definition + 4).value = 1
POINTER.from_address(domain + 0x88).value = definition
POINTER.from_address(domain + 0xB0).value = function(libc, "calloc", POINTER, ctypes.c_size_t, ctypes.c_size_t)(1, 8192)
# A UNIX socket and its path.
place = call(libvirt, "virDomainChrSourceDefNew", None)
ctypes.c_int.from_address(place + 0x18).value = 9
POINTER.from_address(place + 0x28).value = function(libc, "strdup", POINTER, ctypes.c_char_p)(socket.encode())

thread = function(libvirt, "virEventThreadNew", POINTER, ctypes.c_char_p)(b"qmp")
context = call(libvirt, "virEventThreadGetContext", thread)
ignore = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER)(lambda *_: None)
callbacks = (POINTER * 64)()
callbacks[0] = callbacks[1] = ctypes.cast(ignore, POINTER).value
monitor = call(driver, "qemuMonitorOpen", domain, place, context, ctypes.cast(callbacks, POINTER))
if not monitor:
    fail("qemuMonitorOpen")
call(libvirt, "virObjectLock", monitor, result=None)
if call(driver, "qemuMonitorSetCapabilities", monitor, result=ctypes.c_int) != 0:
    fail("qemuMonitorSetCapabilities")

name = function(driver, "qemuMonitorMigrationStatusTypeToString", ctypes.c_char_p, ctypes.c_int)
for _ in sys.stdin:
    figures, said = ctypes.create_string_buffer(1024), ctypes.c_char_p()
    got = call(driver, "qemuMonitorGetMigrationStats", monitor, figures, ctypes.byref(said), result=ctypes.c_int)
    if got != 0:
        message = function(libvirt, "virGetLastErrorMessage", ctypes.c_char_p)() or b""
        print(json.dumps({"refused": message.decode()}), flush=True)
        continue
    status = ctypes.c_int.from_buffer(figures, 0).value
    numbers = [ctypes.c_uint64.from_buffer(figures, 8 * at).value for at in range(1, NUMBERS)]
    print(json.dumps({"status": name(status).decode(), "numbers": numbers, "error": (said.value or b"").decode()}), flush=True)
