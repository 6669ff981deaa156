// Copyright (c) 2026, selfhost.delivery contributors
// GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later

// The app of the benchmark of rollouts: a web service that is ready when its build says so and ends in order on SIGTERM, a worker,
// and a health check for tools that run one in the container. VERSION, READY_AFTER (seconds) and BEHAVE are set in the image.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	kind := "web"
	if len(os.Args) > 1 {
		kind = os.Args[1]
	}
	switch kind {
	case "probe":
		answer, err := http.Get("http://127.0.0.1:8080/api/ready")
		if err != nil || answer.StatusCode != 200 {
			os.Exit(1)
		}
	case "web":
		web()
	default:
		<-told()
	}
}

func told() chan os.Signal {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	return signals
}

func web() {
	behave, version := os.Getenv("BEHAVE"), os.Getenv("VERSION")
	if behave == "crash" {
		fmt.Fprintln(os.Stderr, "web: cannot read its settings")
		os.Exit(3)
	}
	wait, _ := strconv.ParseFloat(os.Getenv("READY_AFTER"), 64)
	ready := time.Now().Add(time.Duration(wait * float64(time.Second)))
	server := &http.Server{Addr: ":8080", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Version", version)
		switch {
		case behave == "never" || time.Now().Before(ready):
			http.Error(w, "not ready", http.StatusServiceUnavailable)
		case r.URL.Path == "/api/ready":
			fmt.Fprintf(w, "{\"version\": %q}\n", version)
		case r.Method == http.MethodPost:
			w.WriteHeader(http.StatusCreated)
		default:
			fmt.Fprintln(w, "here is what was asked for")
		}
	})}
	ended := make(chan struct{})
	go func() {
		<-told()
		until, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(until)
		close(ended)
	}()
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	<-ended
}
