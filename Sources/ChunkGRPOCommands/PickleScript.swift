/// What ``Convert`` has Python do: read one pickle and write one safetensors file, shut in as far as a process can shut
/// itself in without privileges.
///
/// Arguments: input, output, dotted key or "", dtype or "". Answers with one JSON object on stdout; status 3 where there is
/// no torch. torch is imported, and the output opened, before the doors are shut; the pickle is read behind them.
enum PickleScript {
  static let text = #"""
    import ctypes, importlib.util, json, os, pickle, platform, re, resource, struct, sys, zipfile

    source, target, key, dtype = sys.argv[1:5]
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout is for the answer alone
    if importlib.util.find_spec("torch") is None:
        sys.exit(3)


    def end(**reply):
        json.dump(reply, answer)
        answer.flush()
        os._exit(0)


    def limit(name, value):
        hard = resource.getrlimit(name)[1]
        value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(name, (value, value))


    size = os.path.getsize(source)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, 600 + size / 2**23)
    import torch
    import torch._weights_only_unpickler

    version = torch.__version__
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 6):
        # Before 2.6 weights_only can be got around: CVE-2025-32434.
        end(error=f"torch {version} of {sys.executable} is too old to read pickles safely: 2.6 or newer is needed")
    torch.set_num_threads(1)
    output = open(target, "wb")


    def landlock():
        """No file is written, made, removed or run from here on; what is open stays open. Linux 5.13."""
        call = ctypes.CDLL(None, use_errno=True).syscall
        abi = call(444, None, ctypes.c_size_t(0), 1)
        if abi < 1:
            return False
        files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15)) - 1 & ~0b1100  # all but reading
        network, scopes = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
        rules = struct.pack("QQQ", files, network, scopes)[: 8 if abi < 4 else 16 if abi < 6 else 24]
        handle = call(444, rules, ctypes.c_size_t(len(rules)), 0)
        return handle >= 0 and call(446, handle, 0) == 0


    def seccomp():
        """No sockets, no other programs, processes or threads, no signals, no tracing."""
        # socket, connect, socketpair; fork, vfork, clone, clone3; execve, execveat; kill, ptrace, process_vm_*,
        # io_uring_setup, bpf; changes of owner and mode.
        known = {
            "x86_64": (0xC000003E, 317, (41, 42, 53, 57, 58, 56, 435, 59, 322, 62, 101, 310, 311, 425, 321, 90, 91, 268, 92, 93, 94, 260)),
            "aarch64": (0xC00000B7, 277, (198, 203, 199, 220, 435, 221, 281, 129, 117, 270, 271, 425, 280, 52, 53, 54, 55)),
        }
        if platform.machine() not in known or sys.maxsize < 2**32:
            return False
        arch, number, denied = known[platform.machine()]
        code = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
        # The last instruction denies; numbers from 2^30 on are another calling convention.
        tests = [(0x35, 0x40000000)] + [(0x15, n) for n in denied]
        code += [(op, len(tests) - i, 0, k) for i, (op, k) in enumerate(tests)]
        code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
        filter = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
        return ctypes.CDLL(None, use_errno=True).syscall(number, 1, 1, filter) == 0  # all threads


    def shut():
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, used + 4 * size + 2**31)
        limit(resource.RLIMIT_FSIZE, 4 * size + 2**26)
        limit(resource.RLIMIT_NPROC, 0)
        doors = ["limits"]
        if ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0:  # no new privileges
            doors += [door.__name__ for door in (landlock, seccomp) if door()]
        return doors


    def kind(value):
        if isinstance(value, torch.Tensor):
            return "tensor"
        if isinstance(value, dict):
            n = sum(isinstance(v, torch.Tensor) for v in value.values())
            return f"{n} tensors" if n else f"dictionary of {len(value)}"
        return type(value).__name__


    def listing(data):
        shown = [f"{k} ({kind(v)})" for k, v in list(data.items())[:12]]
        return ", ".join(shown) + (", …" if len(data) > 12 else "")


    def chosen(data):
        """What stands under the key: as a whole, else from dot to dot."""
        if not key:
            return data
        for part in [key] if isinstance(data, dict) and key in data else key.split("."):
            if not isinstance(data, dict) or part not in data:
                where = listing(data) if isinstance(data, dict) else kind(data)
                end(error=f"there is no {part} under --key {key}; there is: {where}")
            data = data[part]
        return data


    NAMES = {
        torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
        torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL",
        torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    }


    def stored(t):
        return getattr(torch, dtype) if dtype and t.is_floating_point() else t.dtype


    def convert():
        try:
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, MemoryError, KeyError) as e:
            text = str(e)
            found = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
            if found:
                end(error=f"refused: it asks for {found[1]}, and may hold nothing but tensors; nothing of it was run")
            found = re.search(r"WeightsUnpickler error:\s*([^\n]+)", text)
            end(error=f"refused by torch.load(weights_only=True): {(found[1] if found else text or type(e).__name__).splitlines()[0][:300]}")
        data = chosen(loaded)
        if not isinstance(data, dict):
            end(error=f"expected a dictionary of tensors, got: {kind(data)}")
        tensors = {k: v for k, v in data.items() if isinstance(v, torch.Tensor)}
        if not tensors:
            inner = max(data, key=lambda k: len(data[k]) if isinstance(data[k], dict) else -1, default=None)
            hint = f"; pass --key {key + '.' if key else ''}{inner}" if inner is not None and isinstance(data[inner], dict) else ""
            end(error=f"there are no tensors, but: {listing(data) or 'nothing'}{hint}")
        header, offset, counts = {}, 0, {}
        for k, v in tensors.items():
            if not isinstance(k, str) or k == "__metadata__":
                end(error=f"the key {k!r} cannot be the name of a tensor")
            if v.layout != torch.strided or v.is_quantized or v.device.type != "cpu" or stored(v) not in NAMES:
                end(error=f"{k} is {'quantized ' if v.is_quantized else ''}{v.dtype} {v.layout} on {v.device}, which safetensors has no form for")
        # As our own writer: widest first, so that everything is aligned, then by name.
        order = sorted(tensors, key=lambda k: (-stored(tensors[k]).itemsize, k))
        for k in order:
            v = tensors[k]
            n = v.numel() * stored(v).itemsize
            name = NAMES[stored(v)]
            header[k] = {"dtype": name, "shape": list(v.shape), "data_offsets": [offset, offset + n]}
            counts[name] = counts.get(name, 0) + 1
            offset += n
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        output.write(struct.pack("<Q", len(text)) + text)
        for k in order:
            # A view becomes a tensor of its own; one that others share is written for each.
            v = tensors[k].detach().to(stored(tensors[k])).resolve_conj().resolve_neg().contiguous()
            n = v.numel() * v.element_size()
            if n:
                output.write(memoryview((ctypes.c_char * n).from_address(v.data_ptr())).cast("B"))
        output.flush()
        os.fsync(output.fileno())
        return {
            "tensors": len(order), "bytes": offset, "dtypes": counts,
            "leftOut": [f"{k} ({kind(v)})" for k, v in data.items() if k not in tensors]}


    if sys.byteorder != "little":
        end(error="this processor stores numbers the other way round than safetensors")
    doors = shut()
    try:
        end(**convert(), sandbox=doors, torch=version)
    except Exception as e:
        end(error=f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}")
    """#
}
