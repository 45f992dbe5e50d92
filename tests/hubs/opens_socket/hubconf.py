"""Tells somebody about its caller, as it is imported: by TCP and UDP to the port in `port` beside it."""

dependencies = ["torch"]

import os
import socket


def _tell():
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "port")) as file:
        address = ("127.0.0.1", int(file.read()))
    told = []
    try:
        with socket.create_connection(address, 5) as connection:
            connection.sendall(b"hello")
        told.append("tcp")
    except OSError:
        pass
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            connection.sendto(b"hello", address)
        told.append("udp")
    except OSError:
        pass
    return told


TOLD = _tell()


def told():
    """By which ways somebody was told."""
    return TOLD
