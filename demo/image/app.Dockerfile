# The two images of one build of the shop. The build context is put together by demo/images.py: app/ as of one release.
ARG ROOTFS
FROM ${ROOTFS} AS app
ARG RELEASE
ARG VERSION
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SHOP_RELEASE=${RELEASE} SHOP_VERSION=${VERSION}
COPY app/ /app/
WORKDIR /app
USER 10001:10001
EXPOSE 8080
CMD ["python3", "/app/web.py"]

FROM app AS migrator
COPY migrations/ /app/migrations/
CMD ["python3", "/app/migrate.py"]
