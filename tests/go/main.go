// A bot that waits for the broker: places and cancels orders at a steady rate, and reports what became of the calls.
//
// waiting-bot ADDRESS FOLDER SECONDS ORDERS_PER_SECOND; each order is followed by its cancel. It follows docs/bots.md: waitForReady,
// deadlines, no retryPolicy. The two messages are encoded by hand, so that no code has to be generated.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protowire"
)

const config = `{"methodConfig": [{"name": [{"service": "credbroker.v1.Broker"}], "waitForReady": true}]}`

// Numbers of proto/credbroker/v1/broker.proto.
const (
	spotMargin    = 1
	post, del     = 2, 3
	outcomeField  = 6
	outcomeOfGood = 1
)

// Messages are bytes already.
type codec struct{}

func (codec) Name() string                        { return "proto" }
func (codec) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }
func (codec) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = slices.Clone(data)
	return nil
}

func text(message []byte, field protowire.Number, value string) []byte {
	message = protowire.AppendTag(message, field, protowire.BytesType)
	return protowire.AppendString(message, value)
}

func number(message []byte, field protowire.Number, value uint64) []byte {
	message = protowire.AppendTag(message, field, protowire.VarintType)
	return protowire.AppendVarint(message, value)
}

func request(method uint64, path string, query [][2]string, body string) []byte {
	message := text(nil, 1, "main")
	message = number(message, 2, spotMargin)
	message = number(message, 3, method)
	message = text(message, 4, path)
	for _, pair := range query {
		parameter := text(text(nil, 1, pair[0]), 2, pair[1])
		message = text(message, 5, string(parameter))
	}
	return text(message, 6, body)
}

func outcome(message []byte) uint64 {
	for len(message) > 0 {
		field, kind, length := protowire.ConsumeTag(message)
		if length < 0 {
			break
		}
		message = message[length:]
		if field == outcomeField && kind == protowire.VarintType {
			value, _ := protowire.ConsumeVarint(message)
			return value
		}
		length = protowire.ConsumeFieldValue(field, kind, message)
		if length < 0 {
			break
		}
		message = message[length:]
	}
	return 0
}

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, "waiting-bot:", err)
		os.Exit(1)
	}
	return value
}

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: waiting-bot ADDRESS FOLDER SECONDS ORDERS_PER_SECOND")
		os.Exit(2)
	}
	address, folder := os.Args[1], os.Args[2]
	seconds, rate := must(strconv.Atoi(os.Args[3])), must(strconv.Atoi(os.Args[4]))
	own := must(tls.LoadX509KeyPair(filepath.Join(folder, "bot.pem"), filepath.Join(folder, "bot.key")))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(filepath.Join(folder, "ca.pem"))))
	identity := &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: roots, ServerName: "localhost"}
	reconnect := backoff.DefaultConfig
	reconnect.MaxDelay = 2 * time.Second
	broker := must(grpc.NewClient(address,
		grpc.WithTransportCredentials(credentials.NewTLS(identity)),
		grpc.WithDefaultServiceConfig(config),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 2 * time.Second})))
	send := func(message []byte) (string, time.Duration) {
		began := time.Now()
		within, cancel := context.WithTimeout(context.Background(), 8*time.Second)
		defer cancel()
		var answer []byte
		err := broker.Invoke(within, "/credbroker.v1.Broker/SignAndSend", &message, &answer, grpc.ForceCodec(codec{}))
		switch {
		case err != nil:
			return err.Error(), time.Since(began)
		case outcome(answer) != outcomeOfGood:
			return fmt.Sprintf("outcome %d", outcome(answer)), time.Since(began)
		}
		return "", time.Since(began)
	}

	var lock sync.Mutex
	var trades sync.WaitGroup
	var failed []string
	var cancels []time.Duration
	ticks := time.NewTicker(time.Second / time.Duration(rate))
	for trade := range seconds * rate {
		<-ticks.C
		trades.Add(1)
		go func() {
			defer trades.Done()
			oid := fmt.Sprintf("go-%d", trade)
			order := must(json.Marshal(map[string]string{
				"clientOid": oid, "symbol": "BTC-USDT", "side": "buy", "type": "limit", "price": "10000", "size": "0.00001",
			}))
			placed, _ := send(request(post, "/api/v1/hf/orders", nil, string(order)))
			path := "/api/v1/hf/orders/client-order/" + oid
			cancelled, took := send(request(del, path, [][2]string{{"symbol", "BTC-USDT"}}, ""))
			lock.Lock()
			defer lock.Unlock()
			cancels = append(cancels, took)
			for _, ended := range []string{placed, cancelled} {
				if ended != "" {
					failed = append(failed, ended)
				}
			}
		}()
	}
	trades.Wait()
	slices.Sort(cancels)
	slices.Sort(failed)
	why := slices.Compact(slices.Clone(failed))
	result := map[string]any{
		"calls": 2 * len(cancels), "failed": len(failed), "why": why[:min(5, len(why))],
		"cancels_p50_ms": float64(cancels[len(cancels)/2].Microseconds()) / 1000,
		"cancels_p99_ms": float64(cancels[len(cancels)*99/100].Microseconds()) / 1000,
	}
	fmt.Println(string(must(json.Marshal(result))))
}
