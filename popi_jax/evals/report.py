def write(out, found, *, baseline):
    return "".join(
        f"{r.header['status']} {r.header['labels']} {len(r.items)} {r.header.get('reason', '')}\n"
        for r in found
    )
