# PostgreSQL on a root file system of this machine's own distribution (demo/images.py makes it).
ARG ROOTFS
FROM ${ROOTFS}
ARG PG_BIN
ENV PATH=${PG_BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C.UTF-8
COPY postgres-entrypoint.sh /usr/local/bin/postgres-entrypoint.sh
STOPSIGNAL SIGINT
ENTRYPOINT ["/usr/local/bin/postgres-entrypoint.sh"]
