# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a role gets from a description, and that its secrets stay out."""

from __future__ import annotations

import json

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.selfhost.delivery.plugins.modules import app_spec

APP = {
    "name": "shop",
    "images": {"app": {"source": "ci.example.com/shop/app", "repository": "prod.example.com/shop/app"}},
    "services": {"web": {"image": "app", "port": 8080}},
    "routes": [{"service": "web"}],
    "public": {"url": "https://shop.example.com"},
    "notify": {"webhooks": ["https://hooks.example.com/T0PS3CRET"], "email": {"to": ["a@b"], "username": "u", "password": "H0TW0RD"}},
}


@pytest.fixture
def call(capsys):
    def run_module(**options):
        with patch_module_args({"app": APP, "environment": "production", **options}), pytest.raises(SystemExit):
            app_spec.main()
        text = capsys.readouterr().out
        assert "T0PS3CRET" not in text and "H0TW0RD" not in text
        return json.loads(text)

    return run_module


def test_with_a_tag(call):
    result = call(tag="sha-abc")
    assert result["changed"] is False and "notify" not in result["app"]
    assert result["source_references"] == {"app": "ci.example.com/shop/app:sha-abc"}
    assert result["environment_references"] == {"app": "prod.example.com/shop/app:sha-abc"}
    assert result["image_variables"] == {"app": "APP_IMAGE"} and result["service_images"] == {"web": "app"}
    assert result["routes"] == [{"service": "web", "host": "", "port": 8080}]
    assert result["public_check"]["http"]["query"] == "version == 'sha-abc'" and result["public_timeout"] == 30
    assert result["snapshot"] == {"consistency": "pause", "paths": [], "hooks": [], "volume_options": {}, "volumes": None}


def test_without_a_tag(call):
    result = call()
    assert "source_references" not in result
    assert result["source_images"] == {"app": "ci.example.com/shop/app"}
    assert result["environment_images"] == {"app": "prod.example.com/shop/app"}
    assert result["public_check"]["http"]["query"] == "version == '{tag}'"


@pytest.mark.parametrize("tag", ["latest", "main", "staging"])
def test_a_moving_tag(call, tag):
    result = call(tag=tag)
    assert (
        result["failed"] and result["failure_class"] == "policy" and "moves. Give an immutable tag such as sha-<commit>." in result["msg"]
    )


def test_problems(call):
    result = call(app={**APP, "nmae": 1, "publc": {}})
    assert result["failed"] and result["failure_class"] == "config"
    assert result["problems"] == [
        "delivery_app.nmae: unknown key; did you mean name?",
        "delivery_app.publc: unknown key; did you mean public?",
    ]
